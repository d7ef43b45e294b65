// Adds a warpgroup's sums to fp32 numbers in global memory.
#pragma once

#include "sm90_wgmma.cuh"

namespace megatron_kanana::sm90 {

// The numbers in pieces of 64 rows and 64 columns. Threads hold sums of eight rows each (see
// wgmma), of which 32 bytes lie together; a piece goes through shared memory, so that a warp reads
// and writes whole cache lines. Both dimensions are multiples of 64, the base of 16 bytes.
class AddedPieces {
 public:
  static constexpr int kStagedBytes = 64 * 64 * 4;
  static constexpr int kLoads = 8;  // of four numbers each, by each thread
  using Loaded = float4[kLoads];

  // `sums`: of the first row and column of the warpgroup; those beyond `rows` and `columns` are
  // left out.
  __device__ __forceinline__ AddedPieces(float* sums, int width, int rows, int columns,
                                         void* staged)
      : width_(width), rows_(rows), columns_(columns) {
    const int thread = threadIdx.x % kWarpgroup, warp = thread / kWarp, lane = thread % kWarp;
    first_ = sums + int64_t(warp * 16 + lane / 16) * width + lane % 16 * 4;
    staged_ = shared_address(staged) + warp * 16 * kRowBytes;
  }

  __device__ __forceinline__ void load(int row, int column, Loaded& loaded) const {
    if (!inside(row, column)) return;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) loaded[i] = *place(row, column, i);
  }

  // `part`: the sums of all columns of 64 rows; `loaded`: what load() found.
  template <int kHalf>
  __device__ __forceinline__ void add(int row, int column, const float (&part)[kHalf],
                                      const Loaded& loaded) const {
    if (!inside(row, column)) return;
    const int lane = threadIdx.x % kWarp, row_of_lane = lane / 4, pair = lane % 4;
    __syncwarp();  // the piece before has been read
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      const int first = column * 32 + block * 4;
      const uint32_t address =
          staged(row_of_lane, 2 * block + pair / 2) + pair % 2 * sizeof(float2);
      store_floats(address, part[first], part[first + 1]);
      store_floats(address + 8 * kRowBytes, part[first + 2], part[first + 3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float4 sum = load_floats(staged(2 * i + lane / 16, lane % 16));
      *place(row, column, i) = {loaded[i].x + sum.x, loaded[i].y + sum.y, loaded[i].z + sum.z,
                                loaded[i].w + sum.w};
    }
  }

 private:
  static constexpr int kRowBytes = 64 * 4;

  __device__ __forceinline__ bool inside(int row, int column) const {
    return row * 64 < rows_ && column * 64 < columns_;
  }
  __device__ __forceinline__ float4* place(int row, int column, int i) const {
    return reinterpret_cast<float4*>(first_ + int64_t(row * 64 + 2 * i) * width_ + column * 64);
  }
  // 16 bytes of one of the warp's rows; neither writing nor reading has conflicts of banks.
  __device__ __forceinline__ uint32_t staged(int row, int part) const {
    return staged_ + row * kRowBytes + (part ^ (row % 4 * 2)) * 16;
  }
  static __device__ __forceinline__ float4 load_floats(uint32_t address) {
    float4 found;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w)
                 : "r"(address)
                 : "memory");
    return found;
  }

  float* first_;  // of this thread
  int width_, rows_, columns_;
  uint32_t staged_;
};

}  // namespace megatron_kanana::sm90

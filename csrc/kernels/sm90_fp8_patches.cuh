// Tiles of 128 x 128 numbers bf16 that are quantised to 8 bits in both orders and read from memory
// once. The bulk copy engine brings a tile to shared memory, from where a block's threads take
// patches of 8 x 8 numbers, once for the order of rows and once for that of columns. Each time
// neighbouring threads take the patches along the lines they write, rows or columns, so that
// nothing has to be transposed between threads.
#pragma once

#include "bf16_pairs.cuh"
#include "fp8_quantization.cuh"
#include "sm90_launch.h"
#include "sm90_primitives.cuh"
#include "sm90_tiles.cuh"

namespace megatron_kanana::sm90 {

constexpr int kPatchSize = 8;                       // rows, and columns, of a thread's numbers
constexpr int kPatchWords = kPatchSize / 2;         // of a row: a word has two columns
constexpr int kPatches = kScaleBlock / kPatchSize;  // along a side of a tile
constexpr int kPatchThreads = kPatches * kPatches;
constexpr int kPatchBlocksAtOnce = 4;  // of a multiprocessor
static_assert(kPatchSize * sizeof(__nv_bfloat16) == sizeof(uint4));

// A tile in shared memory, [row % 8][column / 64][row / 8][column % 64]: lines of 64 columns, with
// those of rows that are eight apart after each other. The copy engine swizzles lines: piece p of
// 16 bytes lies at place p ^ (line % 8). A row of a patch is such a piece. Eight threads read at a
// time, and their pieces have to be in different banks. Those of patches beside each other are the
// pieces of one line; those of patches below each other are in eight successive lines, at places
// that the swizzle makes differ, as it would not if lines lay in the order of rows.
struct alignas(1024) PatchTile {
  static constexpr int kLineBytes = kChunk * sizeof(__nv_bfloat16);
  static constexpr int kChunkBytes = kPatches * kLineBytes;
  static constexpr int kChunks = kScaleBlock / kChunk;
  static constexpr int kPiecesOfALine = kChunk / kPatchSize;
  static constexpr int kBytes = kPatchSize * kChunks * kChunkBytes;
  static_assert(kLineBytes == 128 && kBytes == kScaleBlock * kScaleBlock * sizeof(__nv_bfloat16));

  uint8_t bytes[kBytes];
  uint64_t full;  // the barrier that the copy arrives at

  // Of a matrix [rows, columns] that begins at a multiple of 16 bytes. Its rows are two dimensions,
  // and so are its columns, for a box to come in the order above.
  static CUtensorMap map(const void* values, int64_t rows, int64_t columns) {
    return bf16_tensor_map(values, {kChunk, rows / kPatchSize, columns / kChunk, kPatchSize},
                           {kPatchSize * columns, kChunk, columns},
                           {kChunk, kPatches, kChunks, kPatchSize});
  }

  // By all threads of a block; `row` and `column` count tiles. Once in a kernel.
  __device__ __forceinline__ void load(const CUtensorMap& map, int row, int column) {
    if (threadIdx.x == 0) {
      barrier_init(&full, 1);
      barrier_init_fence();
      barrier_expect(&full, kBytes);
      load_box(bytes, &map, &full, 0, row * kPatches, column * kChunks, 0);
    }
    __syncthreads();
    barrier_wait(&full, 0);
  }

  // Row `i` of a patch; `row` and `column` count patches.
  __device__ __forceinline__ uint4 row_of_patch(int row, int column, int i) const {
    const int chunk = i * kChunks + column / kPiecesOfALine;
    const int piece = (column ^ row) % kPiecesOfALine;
    return reinterpret_cast<const uint4*>(bytes + chunk * kChunkBytes + row * kLineBytes)[piece];
  }
};

// The numbers that a thread takes from a tile.
struct Patch {
  uint32_t rows[kPatchSize][kPatchWords];

  // `row` and `column` count patches.
  __device__ __forceinline__ Patch(const PatchTile& tile, int row, int column) {
#pragma unroll
    for (int i = 0; i < kPatchSize; ++i) {
      const uint4 loaded = tile.row_of_patch(row, column, i);
      rows[i][0] = loaded.x, rows[i][1] = loaded.y, rows[i][2] = loaded.z, rows[i][3] = loaded.w;
    }
  }

  // Rows of 8 bytes, `width` bytes apart. `scaled(i, pair)`: two numbers of row i, ready to be
  // rounded.
  template <class Scaled>
  __device__ __forceinline__ void store_rows(uint8_t* to, int64_t width,
                                             const Scaled& scaled) const {
#pragma unroll
    for (int i = 0; i < kPatchSize; ++i) {
      float2 numbers[kPatchWords];
#pragma unroll
      for (int word = 0; word < kPatchWords; ++word) numbers[word] = scaled(i, rows[i][word]);
      *reinterpret_cast<uint2*>(to + i * width) = {
          pack_e4m3(numbers[0].x, numbers[0].y, numbers[1].x, numbers[1].y),
          pack_e4m3(numbers[2].x, numbers[2].y, numbers[3].x, numbers[3].y)};
    }
  }

  // Columns as such rows. `scaled(word, pair)`: two numbers of columns 2 * word and 2 * word + 1.
  template <class Scaled>
  __device__ __forceinline__ void store_columns(uint8_t* to, int64_t width,
                                                const Scaled& scaled) const {
#pragma unroll
    for (int word = 0; word < kPatchWords; ++word) {
      float2 numbers[kPatchSize];
#pragma unroll
      for (int i = 0; i < kPatchSize; ++i) numbers[i] = scaled(word, rows[i][word]);
      auto* const low = reinterpret_cast<uint2*>(to + 2 * word * width);
      auto* const high = reinterpret_cast<uint2*>(to + (2 * word + 1) * width);
      *low = {pack_e4m3(numbers[0].x, numbers[1].x, numbers[2].x, numbers[3].x),
              pack_e4m3(numbers[4].x, numbers[5].x, numbers[6].x, numbers[7].x)};
      *high = {pack_e4m3(numbers[0].y, numbers[1].y, numbers[2].y, numbers[3].y),
               pack_e4m3(numbers[4].y, numbers[5].y, numbers[6].y, numbers[7].y)};
    }
  }
};

// A kernel with one PatchTile a block.
template <class Kernel, class... Arguments>
void launch_patches(Kernel* kernel, const dim3& tiles, void* stream, const char* name,
                    const Arguments&... arguments) {
  kernel<<<tiles, kPatchThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check_cuda(name);
}

}  // namespace megatron_kanana::sm90

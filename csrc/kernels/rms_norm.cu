// RMSNorm and its gradients. A group of threads, a warp or more, holds a row in registers: it is
// read once. Backward, groups walk over rows and sum the gain's gradient of their columns.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "elements.cuh"
#include "rms_norm.h"
#include "sm90_launch.h"
#include "sm90_primitives.cuh"

namespace megatron_kanana {
namespace {

using sm90::kWarp;

constexpr int kThreads = 256;  // of a block
constexpr int kBlocksOfAProcessor = 2;
constexpr int kSummedRows = 8;  // of gain_parts at once

using Eight = Elements<true>;

// kGroup threads hold a row, kParts times eight numbers each.
template <int kGroup_, int kParts_>
struct Row {
  static constexpr int kGroup = kGroup_, kParts = kParts_;
  static constexpr int kGroups = kThreads / kGroup;
  static constexpr int kWidest = kGroup * kParts * 8;

  uint4 parts[kParts];

  __device__ __forceinline__ static int column(int part) {
    return (part * kGroup + int(threadIdx.x) % kGroup) * 8;
  }
  __device__ __forceinline__ void load(const __nv_bfloat16* row, int width) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      parts[part] = column(part) < width ? *reinterpret_cast<const uint4*>(row + column(part))
                                         : make_uint4(0, 0, 0, 0);
    }
  }
};

// Of a row's group; the same in all its threads. `shared`: a number for each warp of the block.
template <int kGroup>
__device__ __forceinline__ float sum_of_group(float value, float* shared) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(~0u, value, distance);
  }
  if constexpr (kGroup > kWarp) {
    const int warp = threadIdx.x / kWarp, first = threadIdx.x / kGroup * (kGroup / kWarp);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) shared[warp] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup / kWarp; ++i) value += shared[first + i];
  }
  return value;
}

template <class Row>
__global__ void __launch_bounds__(kThreads)
    rms_norm_forward_kernel(RmsNormSizes sizes, const __nv_bfloat16* in, const __nv_bfloat16* gain,
                            float epsilon, __nv_bfloat16* out, float* reciprocal) {
  __shared__ float shared[kThreads / kWarp];
  const int64_t index = int64_t(blockIdx.x) * Row::kGroups + threadIdx.x / Row::kGroup;
  const bool exists = index < sizes.rows;
  Row row;
  row.load(in + (exists ? index : 0) * sizes.stride, sizes.width);
  float squares = 0.0f;
#pragma unroll
  for (int part = 0; part < Row::kParts; ++part) {
    const Eight x(row.parts[part]);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += x.values[i] * x.values[i];
  }
  squares = sum_of_group<Row::kGroup>(squares, shared);
  if (!exists) return;
  const float scale = rsqrtf(squares / sizes.width + epsilon);
  if (threadIdx.x % Row::kGroup == 0) reciprocal[index] = scale;
  const float added = sizes.zero_centered ? 1.0f : 0.0f;
#pragma unroll
  for (int part = 0; part < Row::kParts; ++part) {
    const int column = Row::column(part);
    if (column >= sizes.width) break;
    Eight x(row.parts[part]);
    const Eight g(*reinterpret_cast<const uint4*>(gain + column));
#pragma unroll
    for (int i = 0; i < 8; ++i) x.values[i] *= scale * (g.values[i] + added);
    *reinterpret_cast<uint4*>(out + index * sizes.width + column) = x.packed();
  }
}

// With n = in / rms: grad_in = (grad_n - n * mean(grad_n * n)) / rms, grad_n = grad_out * gain.
template <class Row>
__global__ void __launch_bounds__(kThreads)
    rms_norm_backward_kernel(RmsNormSizes sizes, const __nv_bfloat16* grad_out,
                             const __nv_bfloat16* in, const float* reciprocal,
                             const __nv_bfloat16* gain, __nv_bfloat16* grad_in, float* gain_parts) {
  __shared__ float shared[kThreads / kWarp];
  extern __shared__ float of_columns[];
  const float added = sizes.zero_centered ? 1.0f : 0.0f;
  float sums[Row::kParts][8] = {};
  const int group = threadIdx.x / Row::kGroup;
  // All groups of a block go round equally often: they synchronise in sum_of_group.
  for (int64_t first = int64_t(blockIdx.x) * Row::kGroups; first < sizes.rows;
       first += int64_t(gridDim.x) * Row::kGroups) {
    const bool exists = first + group < sizes.rows;
    const int64_t index = exists ? first + group : first;
    Row row, grad;
    row.load(in + index * sizes.stride, sizes.width);
    grad.load(grad_out + index * sizes.width, sizes.width);
    const float scale = exists ? reciprocal[index] : 0.0f;
    float product = 0.0f;
#pragma unroll
    for (int part = 0; part < Row::kParts; ++part) {
      const int column = Row::column(part);
      if (column >= sizes.width) break;
      const Eight x(row.parts[part]), dy(grad.parts[part]);
      const Eight g(*reinterpret_cast<const uint4*>(gain + column));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float normal = x.values[i] * scale;
        sums[part][i] += dy.values[i] * normal;
        product += dy.values[i] * (g.values[i] + added) * normal;
      }
    }
    const float mean = sum_of_group<Row::kGroup>(product, shared) / sizes.width;
    if (!exists) continue;
#pragma unroll
    for (int part = 0; part < Row::kParts; ++part) {
      const int column = Row::column(part);
      if (column >= sizes.width) break;
      const Eight x(row.parts[part]), dy(grad.parts[part]);
      Eight g(*reinterpret_cast<const uint4*>(gain + column));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        g.values[i] = (dy.values[i] * (g.values[i] + added) - x.values[i] * scale * mean) * scale;
      }
      *reinterpret_cast<uint4*>(grad_in + index * sizes.width + column) = g.packed();
    }
  }
  for (int turn = 0; turn < Row::kGroups; ++turn) {
    __syncthreads();
    if (group != turn) continue;
#pragma unroll
    for (int part = 0; part < Row::kParts; ++part) {
      const int column = Row::column(part);
      if (column >= sizes.width) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        of_columns[column + i] = (turn == 0 ? 0.0f : of_columns[column + i]) + sums[part][i];
      }
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < sizes.width; column += kThreads) {
    gain_parts[int64_t(blockIdx.x) * sizes.width + column] = of_columns[column];
  }
}

// A warp has a column each lane, and every kSummedRows-th part.
__global__ void __launch_bounds__(kWarp* kSummedRows)
    rms_norm_gain_kernel(const float* gain_parts, int parts, int width, float* grad_gain) {
  __shared__ float shared[kSummedRows][kWarp];
  const int column = blockIdx.x * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (column < width) {
    for (int part = threadIdx.y; part < parts; part += kSummedRows) {
      sum += gain_parts[int64_t(part) * width + column];
    }
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
#pragma unroll
  for (int row = 1; row < kSummedRows; ++row) sum += shared[row][threadIdx.x];
  grad_gain[column] += sum;
}

// Calls `launch` with the narrowest row that holds the width.
template <class Launch>
void with_row(int width, const Launch& launch) {
  if (width <= Row<32, 1>::kWidest) return launch(Row<32, 1>());
  if (width <= Row<32, 2>::kWidest) return launch(Row<32, 2>());
  if (width <= Row<32, 4>::kWidest) return launch(Row<32, 4>());
  if (width <= Row<32, 8>::kWidest) return launch(Row<32, 8>());
  if (width <= Row<128, 4>::kWidest) return launch(Row<128, 4>());
  if (width <= Row<128, 8>::kWidest) return launch(Row<128, 8>());
  using Widest = Row<256, 8>;
  static_assert(Widest::kWidest == kMaxNormWidth);
  return launch(Widest());
}

template <class Row>
int blocks_of(const RmsNormSizes& sizes) {
  const int64_t all = (sizes.rows + Row::kGroups - 1) / Row::kGroups;
  return static_cast<int>(
      std::min<int64_t>(all, sm90::multiprocessor_count() * kBlocksOfAProcessor));
}

const __nv_bfloat16* bf16(const void* data) { return static_cast<const __nv_bfloat16*>(data); }
__nv_bfloat16* bf16(void* data) { return static_cast<__nv_bfloat16*>(data); }

}  // namespace

void rms_norm_forward(const RmsNormSizes& sizes, const void* in, const void* gain, float epsilon,
                      void* out, float* reciprocal, void* stream) {
  if (sizes.rows == 0) return;
  with_row(sizes.width, [&]<class Row>(Row) {
    const auto blocks = static_cast<unsigned>((sizes.rows + Row::kGroups - 1) / Row::kGroups);
    rms_norm_forward_kernel<Row><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        sizes, bf16(in), bf16(gain), epsilon, bf16(out), reciprocal);
  });
  sm90::check_cuda("rms_norm_forward");
}

int rms_norm_gain_parts(const RmsNormSizes& sizes) {
  int parts = 0;
  with_row(sizes.width, [&]<class Row>(Row) { parts = blocks_of<Row>(sizes); });
  return parts;
}

void rms_norm_backward(const RmsNormSizes& sizes, const void* grad_out, const void* in,
                       const float* reciprocal, const void* gain, void* grad_in, float* gain_parts,
                       float* grad_gain, void* stream) {
  if (sizes.rows == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int bytes = sizes.width * static_cast<int>(sizeof(float));
  with_row(sizes.width, [&]<class Row>(Row) {
    const auto kernel = rms_norm_backward_kernel<Row>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    kernel<<<blocks_of<Row>(sizes), kThreads, bytes, cuda_stream>>>(
        sizes, bf16(grad_out), bf16(in), reciprocal, bf16(gain), bf16(grad_in), gain_parts);
  });
  const dim3 threads(kWarp, kSummedRows);
  rms_norm_gain_kernel<<<(sizes.width + kWarp - 1) / kWarp, threads, 0, cuda_stream>>>(
      gain_parts, rms_norm_gain_parts(sizes), sizes.width, grad_gain);
  sm90::check_cuda("rms_norm_backward");
}

}  // namespace megatron_kanana

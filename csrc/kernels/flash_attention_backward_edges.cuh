// The two short passes around the backward of attention, both bound by memory.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "flash_attention.h"

namespace megatron_kanana {

constexpr int kEdgeThreads = 256;

__device__ __forceinline__ const __nv_bfloat16* attention_row(const AttentionTensor& tensor,
                                                              int64_t position, int64_t sample,
                                                              int64_t head) {
  return static_cast<const __nv_bfloat16*>(tensor.data) + position * tensor.sequence_stride +
         sample * tensor.batch_stride + head * tensor.head_stride;
}

// Before: out_dot_grad = sum(out * grad_out) of each query, and logsumexp in powers of two. Both
// are [batch, heads, padded sequence]; where a query sees nothing, and past the end, the second is
// infinite, so that its weights become zero.
template <int kValueWidth>
__global__ void __launch_bounds__(kEdgeThreads)
    backward_prepare_kernel(AttentionTensor out, AttentionTensor grad_out, const float* logsumexp,
                            float* out_dot_grad, float* logsumexp_log2, int sequence, int padded,
                            int heads, int64_t rows) {
  constexpr int kLanes = kValueWidth / 8;  // of 16 bytes
  const int64_t row = (int64_t(blockIdx.x) * kEdgeThreads + threadIdx.x) / kLanes;
  if (row >= rows) return;
  const int lane = threadIdx.x % kLanes;
  const int position = row % padded;
  const int64_t sample_head = row / padded;
  float sum = 0.0f;
  if (position < sequence) {
    const int64_t sample = sample_head / heads, head = sample_head % heads;
    const uint4 a =
        reinterpret_cast<const uint4*>(attention_row(out, position, sample, head))[lane];
    const uint4 b =
        reinterpret_cast<const uint4*>(attention_row(grad_out, position, sample, head))[lane];
    const auto* a2 = reinterpret_cast<const __nv_bfloat162*>(&a);
    const auto* b2 = reinterpret_cast<const __nv_bfloat162*>(&b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = __bfloat1622float2(a2[i]), y = __bfloat1622float2(b2[i]);
      sum += x.x * y.x + x.y * y.y;
    }
  }
#pragma unroll
  for (int other = kLanes / 2; other > 0; other /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, other);
  }
  if (lane == 0) {
    const float value =
        position < sequence ? logsumexp[sample_head * sequence + position] : -INFINITY;
    out_dot_grad[row] = sum;
    logsumexp_log2[row] = value == -INFINITY ? INFINITY : value * 1.44269504f;
  }
}

// After: grad_query in bf16 from the sums, which lie as the products left them: for each tile of 64
// queries two halves of the columns, each [column / 8][thread of a warpgroup][4].
template <int kWidth>
__global__ void __launch_bounds__(kEdgeThreads)
    backward_finish_kernel(const float* sums, AttentionTensor grad_query, int sequence, int heads,
                           float factor) {
  constexpr int kTile = 64, kHalf = kWidth / 2;
  constexpr int kRow = kWidth + 8;  // padded against bank conflicts
  __shared__ alignas(16) __nv_bfloat16 rows[kTile * kRow];
  const int tiles = (sequence + kTile - 1) / kTile;
  const int tile = blockIdx.x % tiles;
  const int64_t sample = blockIdx.x / tiles / heads, head = blockIdx.x / tiles % heads;
  const auto* source =
      reinterpret_cast<const float4*>(sums) + int64_t(blockIdx.x) * kTile * kWidth / 4;

  const int half = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int row = thread / 32 * 16 + thread % 32 / 4;
  const int first_column = half * kHalf + thread % 4 * 2;
#pragma unroll
  for (int i = 0; i < kHalf / 8; ++i) {
    const float4 x = source[half * kTile * kHalf / 4 + i * 128 + thread];
    __nv_bfloat16* at = rows + row * kRow + first_column + i * 8;
    *reinterpret_cast<__nv_bfloat162*>(at) = __floats2bfloat162_rn(x.x * factor, x.y * factor);
    *reinterpret_cast<__nv_bfloat162*>(at + 8 * kRow) =
        __floats2bfloat162_rn(x.z * factor, x.w * factor);
  }
  __syncthreads();
  constexpr int kLanes = kWidth / 8;
  for (int i = threadIdx.x; i < kTile * kLanes; i += kEdgeThreads) {
    const int position = tile * kTile + i / kLanes;
    if (position >= sequence) return;
    auto* out = const_cast<__nv_bfloat16*>(attention_row(grad_query, position, sample, head));
    reinterpret_cast<uint4*>(out)[i % kLanes] =
        *reinterpret_cast<const uint4*>(rows + i / kLanes * kRow + i % kLanes * 8);
  }
}

}  // namespace megatron_kanana

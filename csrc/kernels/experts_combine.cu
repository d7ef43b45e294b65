// Sums over the experts of each token: the combination of their outputs, and of their gradients.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "moe.h"
#include "sm90_launch.h"
#include "sm90_primitives.cuh"

namespace megatron_kanana {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // rows whose loads are under way together

// A block sums the rows of one token, eight columns a thread at a time.
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const uint4* __restrict__ values, const int32_t* __restrict__ row_of_slot,
                   const float* __restrict__ weights, uint4* __restrict__ out, int experts_of_token,
                   int units) {
  __shared__ int rows[kMaxExpertsOfAToken];
  __shared__ float factors[kMaxExpertsOfAToken];
  __shared__ int count;
  const int64_t token = blockIdx.x;
  if (threadIdx.x < sm90::kWarp) {
    const int k = threadIdx.x;
    const int row = k < experts_of_token ? row_of_slot[token * experts_of_token + k] : -1;
    const uint32_t here = __ballot_sync(~0u, row >= 0);
    if (row >= 0) {
      const int place = __popc(here & ((1u << k) - 1));
      rows[place] = row;
      factors[place] = weights == nullptr ? 1.0f : weights[token * experts_of_token + k];
    }
    if (k == 0) count = __popc(here);
  }
  __syncthreads();
  for (int unit = threadIdx.x; unit < units; unit += kThreads) {
    float sums[8] = {};
    for (int first = 0; first < count; first += kAtOnce) {
      uint4 loaded[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < count) loaded[i] = __ldcs(values + int64_t(rows[first + i]) * units + unit);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= count) break;
        const float factor = factors[first + i];
        const uint32_t words[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const float2 pair = sm90::unpack_bf16(words[word]);
          sums[2 * word] += factor * pair.x;
          sums[2 * word + 1] += factor * pair.y;
        }
      }
    }
    out[token * units + unit] = {
        sm90::pack_bf16(sums[0], sums[1]), sm90::pack_bf16(sums[2], sums[3]),
        sm90::pack_bf16(sums[4], sums[5]), sm90::pack_bf16(sums[6], sums[7])};
  }
}

__global__ void grad_weights_kernel(const float* __restrict__ parts,
                                    const int32_t* __restrict__ row_of_slot, int64_t slots,
                                    int parts_of_row, float* __restrict__ grad_weights) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= slots) return;
  const int row = row_of_slot[slot];
  float sum = 0.0f;
  for (int part = 0; row >= 0 && part < parts_of_row; ++part) {
    sum += parts[int64_t(row) * parts_of_row + part];
  }
  grad_weights[slot] = sum;
}

}  // namespace

void experts_combine(const ExpertSizes& sizes, const ExpertRows& rows, const void* values,
                     const float* weights, void* out, void* stream) {
  if (sizes.tokens == 0) return;
  combine_kernel<<<sizes.tokens, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(values), rows.row_of_slot, weights, static_cast<uint4*>(out),
      sizes.experts_of_token, sizes.hidden_size / 8);
  sm90::check_cuda("experts_combine");
}

void experts_grad_weights(const ExpertSizes& sizes, const ExpertRows& rows,
                          const float* grad_weight_parts, int parts, float* grad_weights,
                          void* stream) {
  const int64_t slots = int64_t(sizes.tokens) * sizes.experts_of_token;
  if (slots == 0) return;
  const int blocks = static_cast<int>((slots + kThreads - 1) / kThreads);
  grad_weights_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      grad_weight_parts, rows.row_of_slot, slots, parts, grad_weights);
  sm90::check_cuda("experts_grad_weights");
}

}  // namespace megatron_kanana

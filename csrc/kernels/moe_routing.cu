// Routing of tokens to experts: sigmoid scores, a bias that balances loads, the best groups of
// experts and the best experts in them, normalised weights (DeepSeek-V3, section 2.1.2). A warp a
// token; lane l has experts l, l + 32, and so on.
#include <cuda_runtime.h>

#include <stdexcept>

#include "moe.h"
#include "sm90_launch.h"
#include "sm90_primitives.cuh"

namespace megatron_kanana {
namespace {

using sm90::kWarp;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr float kNormaliser = 1e-20f;  // as megatron-core's topk_routing_with_score_function adds

// As torch's: exact to the last bits, for choices must not depend on the kernel.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Best {
  float score;
  int index;

  __device__ __forceinline__ bool operator<(const Best& other) const {
    return score < other.score || (score == other.score && index > other.index);
  }
};

// The best of all lanes, in all of them; ties go to the lower index.
__device__ __forceinline__ Best best_of_warp(Best own) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Best other{__shfl_xor_sync(~0u, own.score, distance),
                     __shfl_xor_sync(~0u, own.index, distance)};
    if (own < other) own = other;
  }
  return own;
}

// Lane g has group g: the groups that are not among the best lose their experts' scores.
template <int kOfALane>
__device__ void keep_best_groups(const RoutingSizes& sizes, float* scores_of_warp,
                                 float (&scores)[kOfALane]) {
  const int lane = threadIdx.x % kWarp;
  const int size = sizes.experts / sizes.groups;
#pragma unroll
  for (int i = 0; i < kOfALane; ++i) {
    if (lane + i * kWarp < sizes.experts) scores_of_warp[lane + i * kWarp] = scores[i];
  }
  __syncwarp();
  Best group{-INFINITY, lane};
  if (lane < sizes.groups) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < size; ++i) {
      const float score = scores_of_warp[lane * size + i];
      second = fmaxf(second, fminf(first, score));
      first = fmaxf(first, score);
    }
    group.score = size > 1 ? first + second : first;
  }
  uint32_t kept = 0;
  for (int i = 0; i < sizes.groups_of_token; ++i) {
    const Best best = best_of_warp(group);
    kept |= 1u << best.index;
    if (lane == best.index) group = {-INFINITY, kMaxExperts + lane};
  }
#pragma unroll
  for (int i = 0; i < kOfALane; ++i) {
    const int expert = lane + i * kWarp;
    if (expert < sizes.experts && !(kept >> (expert / size) & 1)) scores[i] = -INFINITY;
  }
}

template <int kOfALane>
__global__ void __launch_bounds__(kThreads)
    route_kernel(RoutingSizes sizes, const float* __restrict__ logits,
                 const float* __restrict__ bias, float* __restrict__ weights,
                 int32_t* __restrict__ experts) {
  extern __shared__ float scores_of_warps[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t token = int64_t(blockIdx.x) * kWarps + warp;
  if (token >= sizes.tokens) return;
  float scores[kOfALane];  // with the bias
#pragma unroll
  for (int i = 0; i < kOfALane; ++i) {
    const int expert = lane + i * kWarp;
    scores[i] = -INFINITY;
    if (expert < sizes.experts) {
      scores[i] = sigmoid(logits[token * sizes.experts + expert]);
      if (bias != nullptr) scores[i] += bias[expert];
    }
  }
  if (sizes.groups > 1) {
    keep_best_groups(sizes, scores_of_warps + warp * sizes.experts, scores);
  }
  int chosen = 0;  // lane k has the token's expert k
  for (int k = 0; k < sizes.experts_of_token; ++k) {
    Best own{-INFINITY, kMaxExperts};
#pragma unroll
    for (int i = 0; i < kOfALane; ++i) {
      const Best candidate{scores[i], lane + i * kWarp};
      if (own < candidate) own = candidate;
    }
    const Best best = best_of_warp(own);
    if (lane == k) chosen = best.index;
#pragma unroll
    for (int i = 0; i < kOfALane; ++i) {
      // Out of the running, below the experts of groups that were left out.
      if (best.index == lane + i * kWarp) scores[i] = __int_as_float(0x7fc00000);
    }
  }
  const bool holds = lane < sizes.experts_of_token;
  chosen = min(chosen, sizes.experts - 1);
  const float score = holds ? sigmoid(logits[token * sizes.experts + chosen]) : 0.0f;
  float sum = score;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(~0u, sum, distance);
  }
  if (!holds) return;
  const float share = sizes.experts_of_token > 1 ? score / (sum + kNormaliser) : score;
  weights[token * sizes.experts_of_token + lane] = share * sizes.scaling_factor;
  experts[token * sizes.experts_of_token + lane] = chosen;
}

template <int kOfALane>
__global__ void __launch_bounds__(kThreads)
    route_backward_kernel(RoutingSizes sizes, const float* __restrict__ grad_weights,
                          const float* __restrict__ logits, const int32_t* __restrict__ experts,
                          float* __restrict__ grad_logits) {
  const int lane = threadIdx.x % kWarp;
  const int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (token >= sizes.tokens) return;
  const bool holds = lane < sizes.experts_of_token;
  const int64_t slot = token * sizes.experts_of_token + lane;
  const int expert = holds ? experts[slot] : 0;
  const float score = holds ? sigmoid(logits[token * sizes.experts + expert]) : 0.0f;
  const float grad = holds ? grad_weights[slot] * sizes.scaling_factor : 0.0f;
  float sum = score, product = grad * score;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(~0u, sum, distance);
    product += __shfl_xor_sync(~0u, product, distance);
  }
  sum += kNormaliser;
  const float grad_score = sizes.experts_of_token > 1 ? (grad - product / sum) / sum : grad;
  const float grad_logit = grad_score * score * (1.0f - score);
  float grads[kOfALane] = {};
  for (int k = 0; k < sizes.experts_of_token; ++k) {
    const int other = __shfl_sync(~0u, expert, k);
    const float value = __shfl_sync(~0u, grad_logit, k);
#pragma unroll
    for (int i = 0; i < kOfALane; ++i) {
      if (other == lane + i * kWarp) grads[i] = value;
    }
  }
#pragma unroll
  for (int i = 0; i < kOfALane; ++i) {
    if (lane + i * kWarp < sizes.experts) {
      grad_logits[token * sizes.experts + lane + i * kWarp] = grads[i];
    }
  }
}

// Sums of whole numbers below 2^24, which are exact in any order.
__global__ void __launch_bounds__(kThreads)
    count_kernel(RoutingSizes sizes, const int32_t* __restrict__ experts_of_slots,
                 const bool* __restrict__ padding, float* __restrict__ counts) {
  extern __shared__ int sums[];
  for (int expert = threadIdx.x; expert < sizes.experts; expert += kThreads) sums[expert] = 0;
  __syncthreads();
  const int64_t slots = int64_t(sizes.tokens) * sizes.experts_of_token;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x; slot < slots; slot += step) {
    if (padding != nullptr && padding[slot / sizes.experts_of_token]) continue;
    if (const int expert = experts_of_slots[slot]; expert >= 0) atomicAdd(&sums[expert], 1);
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < sizes.experts; expert += kThreads) {
    if (sums[expert] > 0) atomicAdd(&counts[expert], static_cast<float>(sums[expert]));
  }
}

// Calls with the number of experts a lane has, as a constant.
template <class Function>
void with_experts_of_a_lane(int experts, const Function& function) {
  if (experts <= 32) return function(std::integral_constant<int, 1>());
  if (experts <= 64) return function(std::integral_constant<int, 2>());
  if (experts <= 128) return function(std::integral_constant<int, 4>());
  if (experts <= 256) return function(std::integral_constant<int, 8>());
  if (experts <= kMaxExperts) return function(std::integral_constant<int, 16>());
  throw std::runtime_error("routing has no kernel for this number of experts");
}

int blocks_of(int tokens) { return (tokens + kWarps - 1) / kWarps; }

}  // namespace

void moe_route(const RoutingSizes& sizes, const float* logits, const float* bias, float* weights,
               int32_t* experts, void* stream) {
  if (sizes.tokens == 0) return;
  const size_t shared = sizes.groups > 1 ? kWarps * sizes.experts * sizeof(float) : 0;
  with_experts_of_a_lane(sizes.experts, [&](auto of_a_lane) {
    route_kernel<of_a_lane>
        <<<blocks_of(sizes.tokens), kThreads, shared, static_cast<cudaStream_t>(stream)>>>(
            sizes, logits, bias, weights, experts);
  });
  sm90::check_cuda("moe_route");
}

void moe_route_backward(const RoutingSizes& sizes, const float* grad_weights, const float* logits,
                        const int32_t* experts, float* grad_logits, void* stream) {
  if (sizes.tokens == 0) return;
  with_experts_of_a_lane(sizes.experts, [&](auto of_a_lane) {
    route_backward_kernel<of_a_lane>
        <<<blocks_of(sizes.tokens), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            sizes, grad_weights, logits, experts, grad_logits);
  });
  sm90::check_cuda("moe_route_backward");
}

void moe_count(const RoutingSizes& sizes, const int32_t* experts, const bool* padding,
               float* counts, void* stream) {
  if (sizes.tokens == 0) return;
  constexpr int kBlocks = 132;
  count_kernel<<<kBlocks, kThreads, sizes.experts * sizeof(int),
                 static_cast<cudaStream_t>(stream)>>>(sizes, experts, padding, counts);
  sm90::check_cuda("moe_count");
}

}  // namespace megatron_kanana

// Cross-entropy of rows of logits and its gradient, each in one pass over the logits: a block a
// row, 16 bytes a load.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cross_entropy.h"
#include "elements.cuh"
#include "exponential.cuh"
#include "sm90_launch.h"
#include "sm90_primitives.cuh"

namespace megatron_kanana {
namespace {

using sm90::kWarp;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAtOnce = 4;  // loads of a thread that are under way together
// Below any logit, and finite: differences with it are no NaN.
constexpr float kLowest = -1e30f;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void from_float(float value, float& target) { target = value; }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16& target) {
  target = __float2bfloat16(value);
}

template <bool kBf16>
using Element = std::conditional_t<kBf16, __nv_bfloat16, float>;

// A maximum, which leaves out NaN, and the sum of exponentials below it, which does not.
struct Sum {
  float maximum;
  float sum;

  // To a maximum that is no smaller.
  __device__ __forceinline__ void raise(float larger) {
    sum *= exponential(maximum - larger);
    maximum = larger;
  }

  __device__ __forceinline__ void add(float value) {
    if (value > maximum) raise(value);
    sum += exponential(value - maximum);
  }

  __device__ __forceinline__ void merge(Sum other) {
    const float larger = fmaxf(maximum, other.maximum);
    raise(larger);
    other.raise(larger);
    sum += other.sum;
  }

  __device__ __forceinline__ Sum of_lane(int distance) const {
    return {__shfl_xor_sync(~0u, maximum, distance), __shfl_xor_sync(~0u, sum, distance)};
  }
};

template <bool kBf16>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(CrossEntropySizes sizes, const Element<kBf16>* __restrict__ logits,
                      const int64_t* __restrict__ labels, float* __restrict__ statistics) {
  using Numbers = Elements<kBf16>;
  __shared__ float maxima[kWarps], sums[kWarps];
  const int64_t row = blockIdx.x;
  const Element<kBf16>* const of_row = logits + row * sizes.stride;
  const uint4* const loads = reinterpret_cast<const uint4*>(of_row);
  const int words = static_cast<int>(sizes.words), count = words / Numbers::kCount;
  Sum own{kLowest, 0.0f};
  for (int first = threadIdx.x; first < count; first += kAtOnce * kThreads) {
    uint4 loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kThreads < count) loaded[i] = __ldcs(loads + first + i * kThreads);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kThreads >= count) break;
      const Numbers numbers(loaded[i]);
      float largest = own.maximum;
#pragma unroll
      for (const float value : numbers.values) largest = fmaxf(largest, value);
      if (largest > own.maximum) own.raise(largest);
#pragma unroll
      for (const float value : numbers.values) own.sum += exponential(value - own.maximum);
    }
  }
  if (const int word = count * Numbers::kCount + static_cast<int>(threadIdx.x); word < words) {
    own.add(to_float(of_row[word]));
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) own.merge(own.of_lane(distance));
  if (threadIdx.x % kWarp == 0) {
    maxima[threadIdx.x / kWarp] = own.maximum;
    sums[threadIdx.x / kWarp] = own.sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) own.merge({maxima[warp], sums[warp]});
  const int64_t label = labels[row] - sizes.first_word;
  const bool is_here = label >= 0 && label < sizes.words;
  statistics[row] = own.maximum;
  statistics[sizes.rows + row] = own.sum;
  statistics[2 * sizes.rows + row] = is_here ? to_float(of_row[label]) : 0.0f;
}

template <bool kBf16>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(CrossEntropySizes sizes, Element<kBf16>* __restrict__ logits,
                    const int64_t* __restrict__ labels, const float* __restrict__ statistics,
                    const float* __restrict__ weights) {
  using Numbers = Elements<kBf16>;
  const int64_t row = blockIdx.x;
  Element<kBf16>* const of_row = logits + row * sizes.stride;
  uint4* const vectors = reinterpret_cast<uint4*>(of_row);
  const int words = static_cast<int>(sizes.words), count = words / Numbers::kCount;
  const float maximum = statistics[row], weight = weights[row];
  const float factor = weight / statistics[sizes.rows + row];
  const int64_t label = labels[row] - sizes.first_word;
  const bool corrects = threadIdx.x == 0 && label >= 0 && label < sizes.words;
  const float logit_of_label = corrects ? to_float(of_row[label]) : 0.0f;
  __syncthreads();  // the label's logit is read before anyone overwrites it
  for (int first = threadIdx.x; first < count; first += kAtOnce * kThreads) {
    uint4 loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kThreads < count) loaded[i] = __ldcs(vectors + first + i * kThreads);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kThreads >= count) break;
      Numbers numbers(loaded[i]);
#pragma unroll
      for (float& value : numbers.values) value = exponential(value - maximum) * factor;
      vectors[first + i * kThreads] = numbers.packed();
    }
  }
  if (const int word = count * Numbers::kCount + static_cast<int>(threadIdx.x); word < words) {
    from_float(exponential(to_float(of_row[word]) - maximum) * factor, of_row[word]);
  }
  __syncthreads();
  if (corrects) {
    from_float(exponential(logit_of_label - maximum) * factor - weight, of_row[label]);
  }
}

}  // namespace

void cross_entropy_statistics(const CrossEntropySizes& sizes, const void* logits,
                              const int64_t* labels, float* statistics, void* stream) {
  if (sizes.rows == 0) return;
  const int blocks = static_cast<int>(sizes.rows);
  const auto launch = [&](auto bf16) {
    statistics_kernel<bf16><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        sizes, static_cast<const Element<bf16>*>(logits), labels, statistics);
  };
  sizes.bf16 ? launch(std::true_type()) : launch(std::false_type());
  sm90::check_cuda("cross_entropy_statistics");
}

void cross_entropy_gradient(const CrossEntropySizes& sizes, void* logits, const int64_t* labels,
                            const float* statistics, const float* weights, void* stream) {
  if (sizes.rows == 0) return;
  const int blocks = static_cast<int>(sizes.rows);
  const auto launch = [&](auto bf16) {
    gradient_kernel<bf16><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        sizes, static_cast<Element<bf16>*>(logits), labels, statistics, weights);
  };
  sizes.bf16 ? launch(std::true_type()) : launch(std::false_type());
  sm90::check_cuda("cross_entropy_gradient");
}

}  // namespace megatron_kanana

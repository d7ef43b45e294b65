// Softmax over scores that come block by block, with the true maximum at every step.
#pragma once

#include "sm90_primitives.cuh"

namespace megatron_kanana::sm90 {

// Two rows of a thread: their running maximum of unscaled logits, their sums.
struct SoftmaxRows {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // scores to exp(scale * (scores - maximum)), sums brought up to date; `decay` is what earlier
  // sums and outputs shrink by.
  template <int kCount>
  __device__ __forceinline__ void update(float (&scores)[kCount], float scale_log2,
                                         float (&decay)[2]) {
    // Four chains a row: one would wait for each comparison.
    float chains[2][4];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float& chain = chains[i / 2 % 2][i / 4 % 2 * 2 + i % 2];
      chain = i < 8 ? scores[i] : fmaxf(chain, scores[i]);
    }
    float highest[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      highest[row] =
          fmaxf(fmaxf(fmaxf(chains[row][0], chains[row][1]), fmaxf(chains[row][2], chains[row][3])),
                maximum[row]);
    }
    float shift[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      highest[row] = fmaxf(highest[row], __shfl_xor_sync(0xffffffff, highest[row], 1));
      highest[row] = fmaxf(highest[row], __shfl_xor_sync(0xffffffff, highest[row], 2));
      // Where nothing is visible yet, minus infinity less minus infinity would be no number.
      shift[row] = highest[row] == -INFINITY ? 0.0f : highest[row] * scale_log2;
      decay[row] = exp2_approximate(maximum[row] * scale_log2 - shift[row]);
      maximum[row] = highest[row];
      sum[row] *= decay[row];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scores[i] = exp2_approximate(fmaf(scores[i], scale_log2, -shift[i / 2 % 2]));
      sum[i / 2 % 2] += scores[i];
    }
  }
};

__device__ __forceinline__ void atomic_maximum(float* address, float value) {
  value += 0.0f;  // minus zero has the bits of the smallest integer
  if (value >= 0.0f) {
    atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
  } else {
    atomicMin(reinterpret_cast<unsigned*>(address), __float_as_uint(value));
  }
}

}  // namespace megatron_kanana::sm90

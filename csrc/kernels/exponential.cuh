// The exponential of probabilities.
#pragma once

#include "sm90_primitives.cuh"

namespace megatron_kanana {

__device__ __forceinline__ float exponential(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  return sm90::exp2_approximate(x * kLog2E);
}

}  // namespace megatron_kanana

// The gated activation of an expert, silu(gate) * up, and its derivative; in fp32.
#pragma once

#include <cuda_bf16.h>

namespace megatron_kanana {

// Two instructions of the special function unit, each exact to about 2^-22.
__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2E = 1.44269504f;
  float exponential, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(-kLog2E * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + exponential));
  return result;
}

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

struct SwigluGradient {
  float activation;  // silu(gate) * up
  float grad_gate;
  float grad_up;

  __device__ __forceinline__ static SwigluGradient of(float gate, float up, float grad) {
    const float s = sigmoid(gate), silu = gate * s;
    return {silu * up, grad * up * (s + silu * (1.0f - s)), grad * silu};
  }
};

}  // namespace megatron_kanana

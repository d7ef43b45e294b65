// Numbers of 8 bits (e4m3) and their scales: a number is its 8 bits times the scale of its block.
// Rows are quantised in blocks of 128 columns, weights in blocks of 128 x 128 (DeepSeek-V3,
// arXiv:2412.19437, section 3.3.2).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "fp8_experts.h"

namespace megatron_kanana {

constexpr int kScaleBlock = kFp8WidthUnit;
constexpr float kLargestE4M3 = 448.0f;

// The scale with which the largest magnitude of a block becomes the format's largest number. Zeros
// stay zeros with any scale; the smallest one has an inverse.
__device__ __forceinline__ float scale_of(float largest) {
  constexpr float kSmallest = 0x1p-100f;
  return fmaxf(largest * (1.0f / kLargestE4M3), kSmallest);
}

// What numbers are multiplied by, exact to a bit: a division takes a branch, and a block's largest
// number becomes the format's either way.
__device__ __forceinline__ float inverse_of(float scale) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scale));
  return inverse;
}

// Two numbers, rounded to the nearest; what is beyond the largest becomes the largest.
__device__ __forceinline__ uint16_t pack_e4m3(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  return static_cast<uint32_t>(pack_e4m3(a, b)) | static_cast<uint32_t>(pack_e4m3(c, d)) << 16;
}

// Two numbers of 8 bits; every one of them is one of 16.
__device__ __forceinline__ float2 unpack_e4m3(uint32_t packed) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(packed)));
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

}  // namespace megatron_kanana

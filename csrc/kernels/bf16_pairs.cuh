// Pairs of bf16 numbers, each pair in one word.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace megatron_kanana {

// Of two numbers bf16 each, the larger magnitude, with a sign that means nothing. A NaN is less
// than any number, as it is to fmaxf.
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  uint32_t found;
  asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
  return found;
}

__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000);
}

__device__ __forceinline__ uint32_t join_lows(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t join_highs(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

// One of the pair's numbers twice. By the type's own functions, as the compiler makes them part of
// the instruction that uses the result, which it does not do with __byte_perm.
__device__ __forceinline__ uint32_t repeat(uint32_t pair, bool high) {
  const auto both = reinterpret_cast<const __nv_bfloat162&>(pair);
  const __nv_bfloat162 found = high ? __high2bfloat162(both) : __low2bfloat162(both);
  return reinterpret_cast<const uint32_t&>(found);
}

}  // namespace megatron_kanana

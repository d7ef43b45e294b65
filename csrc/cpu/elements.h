// Single numbers of tensors in fp32 or bf16, and rows of them in fp32. Included once for each
// target, see vectors.h.
#pragma once

#include "strided_rows.h"
#include "vectors.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

MEGATRON_KANANA_INLINE float widened(float value) { return value; }

MEGATRON_KANANA_INLINE float widened(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

MEGATRON_KANANA_INLINE void narrow(float value, float& target) { target = value; }

// To the nearest, ties to even; NaN stays NaN.
MEGATRON_KANANA_INLINE void narrow(float value, uint16_t& target) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  target = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// target = `count` elements from `offset` on, then zeros up to `padded`.
inline void read_row(const void* data, Dtype dtype, int64_t offset, int64_t count, int64_t padded,
                     float* target) {
  if (dtype == Dtype::kFloat32) {
    __builtin_memcpy(target, static_cast<const float*>(data) + offset, count * sizeof(float));
  } else {
    const uint16_t* const source = static_cast<const uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) target[i] = widened(source[i]);
  }
  __builtin_memset(target + count, 0, (padded - count) * sizeof(float));
}

inline void write_row(const float* source, int64_t count, void* data, Dtype dtype, int64_t offset) {
  if (dtype == Dtype::kFloat32) {
    __builtin_memcpy(static_cast<float*>(data) + offset, source, count * sizeof(float));
  } else {
    uint16_t* const target = static_cast<uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) narrow(source[i], target[i]);
  }
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

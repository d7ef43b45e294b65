// What one load brings, as numbers.
#pragma once

#include "sm90_primitives.cuh"

namespace megatron_kanana {

// Sixteen bytes of bf16 or fp32, as numbers in fp32.
template <bool kBf16>
struct Elements {
  static constexpr int kCount = kBf16 ? 8 : 4;
  float values[kCount];

  __device__ __forceinline__ explicit Elements(uint4 loaded) {
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      if constexpr (kBf16) {
        const float2 pair = sm90::unpack_bf16(words[word]);
        values[2 * word] = pair.x;
        values[2 * word + 1] = pair.y;
      } else {
        values[word] = __uint_as_float(words[word]);
      }
    }
  }

  __device__ __forceinline__ uint4 packed() const {
    uint32_t words[4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      if constexpr (kBf16) {
        words[word] = sm90::pack_bf16(values[2 * word], values[2 * word + 1]);
      } else {
        words[word] = __float_as_uint(values[word]);
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

}  // namespace megatron_kanana

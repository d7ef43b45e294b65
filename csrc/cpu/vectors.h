// Vectors of floats as wide as the target's registers, and what is computed with them.
// Included once for each target, by a file that has chosen it with a pragma and defines
// - MEGATRON_KANANA_CPU_TARGET, a namespace for all that depends on the target;
// - MEGATRON_KANANA_VECTOR, floats in a register, and MEGATRON_KANANA_ROWS, rows of a block of sums
// in
//   registers, two vectors each. (The compiler's own macros do not follow the pragma everywhere.)
// Uses no templates of the standard library: a linker could take their code for one target into
// another's place.
#pragma once

#define MEGATRON_KANANA_INLINE inline __attribute__((always_inline))

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

constexpr int kVector = MEGATRON_KANANA_VECTOR;

typedef float Floats __attribute__((vector_size(kVector * 4)));
typedef int32_t Ints __attribute__((vector_size(kVector * 4)));

MEGATRON_KANANA_INLINE Floats load(const float* data) {
  Floats vector;
  __builtin_memcpy(&vector, data, sizeof(vector));
  return vector;
}

MEGATRON_KANANA_INLINE Ints load(const int32_t* data) {
  Ints vector;
  __builtin_memcpy(&vector, data, sizeof(vector));
  return vector;
}

MEGATRON_KANANA_INLINE void store(float* data, Floats vector) {
  __builtin_memcpy(data, &vector, sizeof(vector));
}

MEGATRON_KANANA_INLINE void store(int32_t* data, Ints vector) {
  __builtin_memcpy(data, &vector, sizeof(vector));
}

MEGATRON_KANANA_INLINE Floats broadcast(float value) { return Floats{} + value; }

// The second operand where the first is NaN.
MEGATRON_KANANA_INLINE Floats maximum(Floats x, Floats y) { return x > y ? x : y; }

// exp(x) for x up to 88, zero below -87, NaN for NaN: 2^n * e^r with |r| <= ln(2)/2 and a Taylor
// polynomial of degree 7 for e^r, whose remainder r^8/8! is below 6e-9.
MEGATRON_KANANA_INLINE Floats exponential(Floats x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f;  // exact in 10 bits, so n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  // 1.5 * 2^23: adding it rounds to an integer, found in the lowest bits.
  constexpr float kRoundingShift = 12582912.0f;
  const Floats shifted = x * kLog2E + kRoundingShift;
  const Floats n = shifted - kRoundingShift;
  const Floats r = (x - n * kLn2High) - n * kLn2Low;
  Floats p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats power = (Floats)(((Ints)shifted + 127) << 23);
  return x < -87.0f ? Floats{} : p * power;
}

// 1 / (1 + exp(-x)), at least 1e-38; NaN for NaN.
MEGATRON_KANANA_INLINE Floats sigmoid(Floats x) {
  const Floats bounded = x < -87.0f ? broadcast(-87.0f) : x;
  return 1.0f / (1.0f + exponential(-bounded));
}

template <int... kIndex>
struct Indices {};

template <int kCount, int... kIndex>
struct IndicesTo : IndicesTo<kCount - 1, kCount - 1, kIndex...> {};

template <int... kIndex>
struct IndicesTo<0, kIndex...> {
  using Type = Indices<kIndex...>;
};

// x and y element by element in turn, from element `kFirst` of each on.
template <int kFirst, int... kIndex>
MEGATRON_KANANA_INLINE Floats interleave(Floats x, Floats y, Indices<kIndex...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, (kFirst + kIndex / 2 + kIndex % 2 * kVector)...);
#else
  return __builtin_shuffle(x, y, Ints{(kFirst + kIndex / 2 + kIndex % 2 * kVector)...});
#endif
}

// Transposes a square of kVector x kVector: as many perfect shuffles as the width has bits.
MEGATRON_KANANA_INLINE void transpose(const float* source, int64_t source_stride, float* target,
                                      int64_t target_stride) {
  using All = IndicesTo<kVector>::Type;
  Floats rows[kVector], shuffled[kVector];
#pragma GCC unroll 16
  for (int row = 0; row < kVector; ++row) rows[row] = load(source + row * source_stride);
#pragma GCC unroll 4
  for (int width = 1; width < kVector; width *= 2) {
#pragma GCC unroll 8
    for (int row = 0; row < kVector / 2; ++row) {
      shuffled[2 * row] = interleave<0>(rows[row], rows[row + kVector / 2], All());
      shuffled[2 * row + 1] = interleave<kVector / 2>(rows[row], rows[row + kVector / 2], All());
    }
#pragma GCC unroll 16
    for (int row = 0; row < kVector; ++row) rows[row] = shuffled[row];
  }
#pragma GCC unroll 16
  for (int row = 0; row < kVector; ++row) store(target + row * target_stride, rows[row]);
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

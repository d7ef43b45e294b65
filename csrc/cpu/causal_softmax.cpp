#include "causal_softmax.h"

#include <algorithm>
#include <bit>
#include <limits>

// One binary serves old and new x86 machines: the loader picks the widest vectors there are.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST_VECTORS __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define WIDEST_VECTORS
#endif

namespace megatron_kanana::cpu {
namespace {

// Independent partial results, so that the compiler may keep them in vector lanes.
constexpr int64_t kLanes = 16;

// exp(x) for x <= 0: 2^n * e^r with |r| <= ln(2)/2 and a Taylor polynomial of degree 7 for e^r,
// whose remainder r^8/8! is below 6e-9. Smaller than -87 counts as -87 (1.6e-38).
inline float exp_nonpositive(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f;  // exact in 10 bits, so n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * kLog2E + kRoundingShift;
  const float n = shifted - kRoundingShift;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  return p * std::bit_cast<float>(exponent);
}

}  // namespace

WIDEST_VECTORS
float causal_softmax_row(float* whole_row, int64_t length, int64_t first, int64_t stop,
                         float scale) {
  float* const row = whole_row + first;
  const int64_t visible = stop - first;
  float lane_max[kLanes];
  std::fill(lane_max, lane_max + kLanes, -std::numeric_limits<float>::infinity());
  const int64_t whole = visible - visible % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      row[i + lane] *= scale;
      lane_max[lane] = row[i + lane] > lane_max[lane] ? row[i + lane] : lane_max[lane];
    }
  }
  for (int64_t i = whole; i < visible; ++i) {
    row[i] *= scale;
    lane_max[0] = row[i] > lane_max[0] ? row[i] : lane_max[0];
  }
  const float maximum = *std::max_element(lane_max, lane_max + kLanes);

  float lane_sum[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      row[i + lane] = exp_nonpositive(row[i + lane] - maximum);
      lane_sum[lane] += row[i + lane];
    }
  }
  for (int64_t i = whole; i < visible; ++i) {
    row[i] = exp_nonpositive(row[i] - maximum);
    lane_sum[0] += row[i];
  }
  float sum = 0.0f;
  for (const float partial : lane_sum) sum += partial;
  const float inverse = 1.0f / sum;
  for (int64_t i = 0; i < visible; ++i) row[i] *= inverse;
  std::fill(whole_row, row, 0.0f);
  std::fill(row + visible, whole_row + length, 0.0f);
  return maximum;
}

WIDEST_VECTORS
void causal_softmax_backward_row(float* grad, const float* probabilities, int64_t length,
                                 int64_t visible, float scale) {
  float lane_sum[kLanes] = {};
  const int64_t whole = visible - visible % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lane_sum[lane] += grad[i + lane] * probabilities[i + lane];
    }
  }
  for (int64_t i = whole; i < visible; ++i) lane_sum[0] += grad[i] * probabilities[i];
  float sum = 0.0f;
  for (const float partial : lane_sum) sum += partial;
  for (int64_t i = 0; i < visible; ++i) {
    grad[i] = scale * probabilities[i] * (grad[i] - sum);
  }
  std::fill(grad + visible, grad + length, 0.0f);
}

}  // namespace megatron_kanana::cpu

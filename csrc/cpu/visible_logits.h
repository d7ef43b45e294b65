// Which keys a query sees, and its logits for them. Logits are computed transposed, keys by
// queries: queries lie in the lanes of vectors, so that maxima and sums over keys need no lane to
// meet another. Included once for each target, see vectors.h.
#pragma once

#include "flash_attention.h"
#include "matrix_product.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

constexpr float kInfinity = __builtin_inff();

MEGATRON_KANANA_INLINE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
MEGATRON_KANANA_INLINE int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }
MEGATRON_KANANA_INLINE int64_t clamp(int64_t x, int64_t least, int64_t most) {
  return larger(smaller(x, most), least);
}
MEGATRON_KANANA_INLINE int64_t round_up(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit * unit;
}

// The keys [begin, end) that each of a column's queries sees: nothing where they are equal.
struct VisibleKeys {
  int32_t begin[kColumn];
  int32_t end[kColumn];
  // Seen by any of the queries, and by all of them.
  int64_t any_begin, any_end;
  int64_t all_begin, all_end;

  void of_queries(const FlashAttentionProblem& problem, int64_t sample, int64_t first) {
    any_begin = problem.length, any_end = 0;
    all_begin = 0, all_end = problem.length;
    for (int lane = 0; lane < kColumn; ++lane) {
      const int64_t query = first + lane;
      // Behind the last query begin and end stay in order: both never fall from lane to lane.
      int64_t lane_begin = query < problem.length ? 0 : problem.length, lane_end = problem.length;
      if (problem.documents != nullptr && query < problem.length) {
        const int64_t token = sample * problem.length + query;
        lane_begin = problem.documents[token];
        lane_end = problem.documents[problem.batch * problem.length + token];
      }
      if (problem.causal) lane_end = smaller(lane_end, query + 1);
      if (lane_begin < lane_end) {
        any_begin = smaller(any_begin, lane_begin);
        any_end = larger(any_end, lane_end);
      }
      all_begin = larger(all_begin, lane_begin);
      all_end = smaller(all_end, lane_end);
      begin[lane] = static_cast<int32_t>(lane_begin);
      end[lane] = static_cast<int32_t>(lane_end);
    }
  }
  bool all_see(int64_t key, int64_t count) const {
    return key >= all_begin && key + count <= all_end;
  }
  bool none_sees(int64_t key, int64_t count) const {
    return key >= any_end || key + count <= any_begin;
  }
  // Lanes of vector `vector` that see the key: all bits or none.
  MEGATRON_KANANA_INLINE Ints see(int64_t key, int vector) const {
    const Ints keys = Ints{} + static_cast<int32_t>(key);
    return (keys >= load(begin + vector * kVector)) & (keys < load(end + vector * kVector));
  }
};

// Logits of kRows keys from `key` on, unscaled and hidden ones -inf.
MEGATRON_KANANA_INLINE Block<2> visible_logits(const float* key_rows, int64_t stride,
                                               const float* query_panel, int64_t width, int64_t key,
                                               const VisibleKeys& visible) {
  Block<2> logits =
      product_in_parts<Left::kRowByRow, 2>(key_rows, stride, query_panel, kColumn, width);
  if (!visible.all_see(key, kRows)) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
      for (int vector = 0; vector < 2; ++vector) {
        Floats& sums = logits.sums[row][vector];
        sums = visible.see(key + row, vector) ? sums : broadcast(-kInfinity);
      }
    }
  }
  return logits;
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

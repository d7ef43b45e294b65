// Backward pass of flash attention. Included once for each target, see vectors.h.
#pragma once

#include "visible_logits.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

// What the gradients of a tile of queries need, beside the rows themselves.
struct QueryTile {
  VisibleKeys visible[kTile / kColumn];
  int64_t any_begin, any_end;  // keys that any of the queries sees
  float logsumexp[kTile];      // zero where nothing is visible: exp(-inf - 0) is the zero wanted
  float delta[kTile];

  int32_t begin(int64_t lane) const { return visible[lane / kColumn].begin[lane % kColumn]; }
  int32_t end(int64_t lane) const { return visible[lane / kColumn].end[lane % kColumn]; }

  void of_queries(const FlashAttentionProblem& problem, const BackwardBuffers& buffers,
                  int64_t head, int64_t first) {
    any_begin = problem.length, any_end = 0;
    for (int column = 0; column < kTile / kColumn; ++column) {
      visible[column].of_queries(problem, head / problem.query_heads, first + column * kColumn);
      any_begin = smaller(any_begin, visible[column].any_begin);
      any_end = larger(any_end, visible[column].any_end);
    }
    for (int64_t lane = 0; lane < kTile; ++lane) {
      const bool exists = first + lane < problem.length;
      const float value =
          exists ? buffers.logsumexp[head * problem.length + first + lane] : -kInfinity;
      logsumexp[lane] = value == -kInfinity ? 0.0f : value;
      delta[lane] = exists ? buffers.delta[head * problem.padded_length() + first + lane] : 0.0f;
    }
  }

  // For each block of kRows keys from `tile` on, the queries that see any of them.
  void that_see(int64_t tile, int64_t count, Range* ranges) const {
    int64_t first = 0, stop = 0;
    for (int64_t row = 0; row < count; row += kRows) {
      while (first < kTile && end(first) <= tile + row) ++first;
      while (stop < kTile && begin(stop) < tile + row + kRows) ++stop;
      ranges[row / kRows] = {first, stop};
    }
  }

  // For each block of kRows queries, the keys from `tile` to `tile + count` that any of them sees.
  void seen_keys(int64_t tile, int64_t count, Range* ranges) const {
    for (int64_t lane = 0; lane < kTile; lane += kRows) {
      ranges[lane / kRows] = {larger(begin(lane) - tile, 0),
                              smaller(end(lane + kRows - 1) - tile, count)};
    }
  }
};

// Memory of one thread, cut from its scratch.
struct BackwardScratch {
  float* query_panels;     // [kTile / kColumn, width, kColumn]
  float* grad_out_panels;  // [kTile / kColumn, value width, kColumn]
  float* probabilities;    // [kTile keys, kTile queries]
  float* grad_logits;      // the same

  BackwardScratch(const BackwardBuffers& buffers, float* scratch)
      : query_panels(scratch),
        grad_out_panels(query_panels + kTile * buffers.query.width),
        probabilities(grad_out_panels + kTile * buffers.value.width),
        grad_logits(probabilities + kTile * kTile) {}
};

inline int64_t backward_scratch(const BackwardBuffers& buffers) {
  return kTile * (buffers.query.width + buffers.value.width + 2 * kTile);
}

// Probabilities and gradients of the scaled logits of `count` keys from `tile` on.
inline void backward_logits(const FlashAttentionProblem& problem, const BackwardBuffers& buffers,
                            const BackwardScratch& scratch, const QueryTile& queries,
                            const float* keys, const float* values, int64_t tile, int64_t count) {
  const int64_t width = buffers.query.width, value_width = buffers.value.width;
  for (int column = 0; column < kTile / kColumn; ++column) {
    const VisibleKeys& visible = queries.visible[column];
    const float* const query_panel = scratch.query_panels + column * width * kColumn;
    const float* const grad_panel = scratch.grad_out_panels + column * value_width * kColumn;
    for (int64_t row = 0; row < count; row += kRows) {
      float* const probabilities = scratch.probabilities + row * kTile + column * kColumn;
      float* const grad_logits = scratch.grad_logits + row * kTile + column * kColumn;
      if (visible.none_sees(tile + row, kRows)) {
        for (int i = 0; i < kRows; ++i) {
          __builtin_memset(probabilities + i * kTile, 0, kColumn * sizeof(float));
          __builtin_memset(grad_logits + i * kTile, 0, kColumn * sizeof(float));
        }
        continue;
      }
      const Block<2> logits =
          visible_logits(keys + (tile + row) * buffers.key.stride, buffers.key.stride, query_panel,
                         width, tile + row, visible);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int vector = 0; vector < 2; ++vector) {
          const Floats subtracted = load(queries.logsumexp + column * kColumn + vector * kVector);
          store(probabilities + i * kTile + vector * kVector,
                exponential(logits.sums[i][vector] * problem.scale - subtracted));
        }
      }
      const Block<2> grads =
          block_product<Left::kRowByRow, 2>(values + (tile + row) * buffers.value.stride,
                                            buffers.value.stride, grad_panel, kColumn, value_width);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int vector = 0; vector < 2; ++vector) {
          const int place = i * kTile + vector * kVector;
          const Floats delta = load(queries.delta + column * kColumn + vector * kVector);
          store(grad_logits + place, load(probabilities + place) * (grads.sums[i][vector] - delta));
        }
      }
    }
  }
}

// One piece is a chunk of keys of one key head, with all the queries that see any of them.
inline void backward_piece(const FlashAttentionProblem& problem, const BackwardBuffers& buffers,
                           int64_t piece, float* scratch_data) {
  const BackwardScratch scratch(buffers, scratch_data);
  const int64_t key_head = piece / buffers.chunks, chunk = piece % buffers.chunks;
  const int64_t padded_length = problem.padded_length();
  const int64_t chunk_keys = (padded_length / kTile + buffers.chunks - 1) / buffers.chunks * kTile;
  const int64_t chunk_begin = smaller(chunk * chunk_keys, padded_length);
  const int64_t chunk_end = smaller(chunk_begin + chunk_keys, padded_length);
  const HeadRows &query = buffers.query, &key = buffers.key;
  const HeadRows &value = buffers.value, &grad_out = buffers.grad_out;
  const float* const keys = key.of_head(problem, key_head);
  const float* const values = value.of_head(problem, key_head);
  float* const grad_keys = buffers.grad_key.of_head(problem, key_head);
  float* const grad_values = buffers.grad_value.of_head(problem, key_head);
  const int64_t cleared_rows = chunk_end - chunk_begin;
  __builtin_memset(grad_keys + chunk_begin * key.stride, 0,
                   cleared_rows * key.stride * sizeof(float));
  __builtin_memset(grad_values + chunk_begin * value.stride, 0,
                   cleared_rows * value.stride * sizeof(float));

  const int64_t group = problem.query_heads / problem.key_heads;
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    float* const grad_queries =
        buffers.grad_query.of_head(problem, head) + chunk * buffers.grad_query.floats(problem);
    __builtin_memset(grad_queries, 0, padded_length * query.stride * sizeof(float));
    for (int64_t first = 0; first < padded_length; first += kTile) {
      QueryTile queries;
      queries.of_queries(problem, buffers, head, first);
      const int64_t begin = larger(queries.any_begin / kRows * kRows, chunk_begin);
      const int64_t end = smaller(queries.any_end, chunk_end);
      if (begin >= end) continue;
      const float* const query_rows = query.of_head(problem, head) + first * query.stride;
      const float* const grad_rows = grad_out.of_head(problem, head) + first * grad_out.stride;
      transpose_panels(query_rows, query.stride, kTile, query.width, scratch.query_panels);
      transpose_panels(grad_rows, grad_out.stride, kTile, grad_out.width, scratch.grad_out_panels);
      for (int64_t tile = begin; tile < end; tile += kTile) {
        const int64_t count = smaller(kTile, (end - tile + kRows - 1) / kRows * kRows);
        backward_logits(problem, buffers, scratch, queries, keys, values, tile, count);
        Range seen[kTile / kRows];
        queries.that_see(tile, count, seen);
        add_banded_product<Left::kRowByRow>(scratch.probabilities, kTile, count, seen, grad_rows,
                                            grad_values + tile * value.stride, value.stride,
                                            value.width);
        add_banded_product<Left::kRowByRow>(scratch.grad_logits, kTile, count, seen, query_rows,
                                            grad_keys + tile * key.stride, key.stride, key.width);
        queries.seen_keys(tile, count, seen);
        add_banded_product<Left::kColumnByColumn>(
            scratch.grad_logits, kTile, kTile, seen, keys + tile * key.stride,
            grad_queries + first * query.stride, query.stride, query.width);
      }
    }
  }
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

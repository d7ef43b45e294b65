// Backward pass of flash attention. Included once for each target, see vectors.h.
#pragma once

#include "visible_logits.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

// What a tile of queries sees.
struct QueryTile {
  VisibleKeys visible[kTile / kColumn];
  int64_t any_begin, any_end;  // keys that any of the queries sees

  int32_t begin(int64_t lane) const { return visible[lane / kColumn].begin[lane % kColumn]; }
  int32_t end(int64_t lane) const { return visible[lane / kColumn].end[lane % kColumn]; }

  void of_queries(const FlashAttentionProblem& problem, int64_t sample, int64_t first) {
    any_begin = problem.length, any_end = 0;
    for (int column = 0; column < kTile / kColumn; ++column) {
      visible[column].of_queries(problem, sample, first + column * kColumn);
      any_begin = smaller(any_begin, visible[column].any_begin);
      any_end = larger(any_end, visible[column].any_end);
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

// Memory of one thread, cut from its scratch. Rows are as `read_rows` lays them out.
struct BackwardScratch {
  // Of a tile of queries.
  float* query_rows;
  float* grad_out_rows;
  float* grad_query_rows;
  float* query_panels;     // [kTile / kColumn, width, kColumn]
  float* grad_out_panels;  // [kTile / kColumn, value width, kColumn]
  float* probabilities;    // [kTile keys, kTile queries]
  float* grad_logits;      // the same
  float* logsumexp;        // [kTile], zero where nothing is visible
  float* delta;            // [kTile]: row sums of grad_out * out
  // Of a chunk of keys.
  float* key_rows;
  float* value_rows;
  float* grad_key_rows;
  float* grad_value_rows;
  float* end;

  BackwardScratch(const BackwardTensors& tensors, int64_t chunk_keys, float* scratch)
      : query_rows(scratch),
        grad_out_rows(query_rows + kTile * tensors.query.row_stride()),
        grad_query_rows(grad_out_rows + kTile * tensors.grad_out.row_stride()),
        query_panels(grad_query_rows + kTile * tensors.query.row_stride()),
        grad_out_panels(query_panels + kTile * tensors.query.padded_width()),
        probabilities(grad_out_panels + kTile * tensors.grad_out.padded_width()),
        grad_logits(probabilities + kTile * kTile),
        logsumexp(grad_logits + kTile * kTile),
        delta(logsumexp + kTile),
        key_rows(delta + kTile),
        value_rows(key_rows + chunk_keys * tensors.key.row_stride()),
        grad_key_rows(value_rows + chunk_keys * tensors.value.row_stride()),
        grad_value_rows(grad_key_rows + chunk_keys * tensors.key.row_stride()),
        end(grad_value_rows + chunk_keys * tensors.value.row_stride()) {}
};

// Keys of a chunk, the last one's perhaps beyond the sequence.
inline int64_t keys_of_chunk(const FlashAttentionProblem& problem, const BackwardTensors& tensors) {
  return round_up(round_up(problem.length, tensors.chunks) / tensors.chunks, kTile);
}

inline int64_t backward_scratch(const FlashAttentionProblem& problem,
                                const BackwardTensors& tensors) {
  float* const none = nullptr;
  return BackwardScratch(tensors, keys_of_chunk(problem, tensors), none).end - none;
}

// Lays out a tile of queries: rows, panels, logarithms and delta.
inline void read_queries(const FlashAttentionProblem& problem, const BackwardTensors& tensors,
                         const BackwardScratch& scratch, const HeadPositions& queries) {
  read_rows(tensors.query, queries, kTile, scratch.query_rows);
  read_rows(tensors.grad_out, queries, kTile, scratch.grad_out_rows);
  transpose_panels(scratch.query_rows, tensors.query.row_stride(), kTile,
                   tensors.query.padded_width(), scratch.query_panels);
  transpose_panels(scratch.grad_out_rows, tensors.grad_out.row_stride(), kTile,
                   tensors.grad_out.padded_width(), scratch.grad_out_panels);
  scalar_products(scratch.grad_out_rows, tensors.out, queries, scratch.delta);
  const int64_t head = queries.sample * problem.query_heads + queries.head;
  for (int64_t lane = 0; lane < kTile; ++lane) {
    float logsumexp = -kInfinity;
    if (lane < queries.count) {
      logsumexp = tensors.logsumexp[head * problem.length + queries.first + lane];
    } else {
      scratch.delta[lane] = 0.0f;
    }
    // With hidden logits of -inf, zero gives the probability zero and -inf would give NaN.
    scratch.logsumexp[lane] = logsumexp == -kInfinity ? 0.0f : logsumexp;
  }
}

// Probabilities and gradients of the scaled logits of `count` keys from `tile` on.
// The first of them is row `chunk_row` of the chunk.
inline void backward_logits(const BackwardTensors& tensors, const BackwardScratch& scratch,
                            const QueryTile& queries, float scale, int64_t tile, int64_t chunk_row,
                            int64_t count) {
  const int64_t width = tensors.query.padded_width();
  const int64_t value_width = tensors.grad_out.padded_width();
  const int64_t key_stride = tensors.key.row_stride(), value_stride = tensors.value.row_stride();
  const float* const keys = scratch.key_rows + chunk_row * key_stride;
  const float* const values = scratch.value_rows + chunk_row * value_stride;
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
      const Block<2> logits = visible_logits(keys + row * key_stride, key_stride, query_panel,
                                             width, tile + row, visible);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int vector = 0; vector < 2; ++vector) {
          const Floats logsumexp = load(scratch.logsumexp + column * kColumn + vector * kVector);
          store(probabilities + i * kTile + vector * kVector,
                exponential(logits.sums[i][vector] * scale - logsumexp));
        }
      }
      const Block<2> grads = block_product<Left::kRowByRow, 2>(
          values + row * value_stride, value_stride, grad_panel, kColumn, value_width);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int vector = 0; vector < 2; ++vector) {
          const int place = i * kTile + vector * kVector;
          const Floats delta = load(scratch.delta + column * kColumn + vector * kVector);
          store(grad_logits + place, load(probabilities + place) * (grads.sums[i][vector] - delta));
        }
      }
    }
  }
}

// One piece is a chunk of keys of one key head, with all the queries that see any of them.
inline void backward_piece(const FlashAttentionProblem& problem, const BackwardTensors& tensors,
                           int64_t piece, float* scratch_data) {
  const int64_t chunk_keys = keys_of_chunk(problem, tensors);
  const BackwardScratch scratch(tensors, chunk_keys, scratch_data);
  const int64_t chunk = piece % tensors.chunks, key_head = piece / tensors.chunks;
  const int64_t sample = key_head / problem.key_heads;
  const int64_t chunk_begin = smaller(chunk * chunk_keys, problem.length);
  const int64_t chunk_end = smaller(chunk_begin + chunk_keys, problem.length);
  const HeadPositions keys = {sample, key_head % problem.key_heads, chunk_begin,
                              chunk_end - chunk_begin};
  const int64_t key_stride = tensors.key.row_stride(), value_stride = tensors.value.row_stride();
  const int64_t width = tensors.query.padded_width();
  const int64_t value_width = tensors.grad_out.padded_width();
  read_rows(tensors.key, keys, chunk_keys, scratch.key_rows);
  read_rows(tensors.value, keys, chunk_keys, scratch.value_rows);
  __builtin_memset(scratch.grad_key_rows, 0, chunk_keys * key_stride * sizeof(float));
  __builtin_memset(scratch.grad_value_rows, 0, chunk_keys * value_stride * sizeof(float));
  StridedTensor grad_query = tensors.grad_query;
  grad_query.data = static_cast<float*>(grad_query.data) + chunk * tensors.chunk_stride;

  const int64_t group = problem.query_heads / problem.key_heads;
  for (int64_t head = keys.head * group; head < (keys.head + 1) * group; ++head) {
    for (int64_t first = 0; first < problem.length; first += kTile) {
      const HeadPositions positions = {sample, head, first, smaller(kTile, problem.length - first)};
      QueryTile queries;
      queries.of_queries(problem, sample, first);
      const int64_t begin = larger(queries.any_begin / kRows * kRows, chunk_begin);
      const int64_t end = smaller(queries.any_end, chunk_end);
      if (begin < end) read_queries(problem, tensors, scratch, positions);
      __builtin_memset(scratch.grad_query_rows, 0, kTile * key_stride * sizeof(float));
      for (int64_t tile = begin; tile < end; tile += kTile) {
        const int64_t row = tile - chunk_begin;
        const int64_t count = smaller(kTile, round_up(end - tile, kRows));
        backward_logits(tensors, scratch, queries, problem.scale, tile, row, count);
        Range seen[kTile / kRows];
        queries.that_see(tile, count, seen);
        add_banded_product<Left::kRowByRow>(
            scratch.probabilities, kTile, count, seen, scratch.grad_out_rows,
            scratch.grad_value_rows + row * value_stride, value_stride, value_width);
        add_banded_product<Left::kRowByRow>(
            scratch.grad_logits, kTile, count, seen, scratch.query_rows,
            scratch.grad_key_rows + row * key_stride, key_stride, width);
        queries.seen_keys(tile, count, seen);
        add_banded_product<Left::kColumnByColumn>(scratch.grad_logits, kTile, kTile, seen,
                                                  scratch.key_rows + row * key_stride,
                                                  scratch.grad_query_rows, key_stride, width);
      }
      write_rows(scratch.grad_query_rows, problem.scale, grad_query, positions);
    }
  }
  write_rows(scratch.grad_key_rows, problem.scale, tensors.grad_key, keys);
  write_rows(scratch.grad_value_rows, 1.0f, tensors.grad_value, keys);
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

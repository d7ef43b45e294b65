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
  // Of a tile of queries; `keys` is the padded length.
  float* query_rows;
  float* grad_out_rows;
  float* grad_query_rows;
  float* query_panels;     // [kTile / kColumn, width, kColumn]
  float* grad_out_panels;  // [kTile / kColumn, value width, kColumn]
  float* probabilities;    // [keys, kTile]: unscaled logits first
  float* grad_logits;      // [keys, kTile]: gradients of the probabilities first
  // Of all keys.
  float* key_rows;
  float* value_rows;
  float* grad_key_rows;
  float* grad_value_rows;
  float* end;

  BackwardScratch(const BackwardTensors& tensors, int64_t keys, float* scratch)
      : query_rows(scratch),
        grad_out_rows(query_rows + kTile * tensors.query.row_stride()),
        grad_query_rows(grad_out_rows + kTile * tensors.grad_out.row_stride()),
        query_panels(grad_query_rows + kTile * tensors.query.row_stride()),
        grad_out_panels(query_panels + kTile * tensors.query.padded_width()),
        probabilities(grad_out_panels + kTile * tensors.grad_out.padded_width()),
        grad_logits(probabilities + keys * kTile),
        key_rows(grad_logits + keys * kTile),
        value_rows(key_rows + keys * tensors.key.row_stride()),
        grad_key_rows(value_rows + keys * tensors.value.row_stride()),
        grad_value_rows(grad_key_rows + keys * tensors.key.row_stride()),
        end(grad_value_rows + keys * tensors.value.row_stride()) {}
};

inline int64_t backward_scratch(const FlashAttentionProblem& problem,
                                const BackwardTensors& tensors) {
  float* const none = nullptr;
  return BackwardScratch(tensors, problem.padded_length(), none).end - none;
}

// Lays out a tile of queries: rows and panels.
inline void read_queries(const BackwardTensors& tensors, const BackwardScratch& scratch,
                         const HeadPositions& queries) {
  read_rows(tensors.query, queries, kTile, scratch.query_rows);
  read_rows(tensors.grad_out, queries, kTile, scratch.grad_out_rows);
  transpose_panels(scratch.query_rows, tensors.query.row_stride(), kTile,
                   tensors.query.padded_width(), scratch.query_panels);
  transpose_panels(scratch.grad_out_rows, tensors.grad_out.row_stride(), kTile,
                   tensors.grad_out.padded_width(), scratch.grad_out_panels);
}

// Unscaled logits and gradients of the probabilities, for a column of the tile's queries and the
// keys from `begin` to `end`, a range of whole blocks; and the largest logits.
inline void backward_logits(const BackwardTensors& tensors, const BackwardScratch& scratch,
                            const VisibleKeys& visible, int column, int64_t begin, int64_t end,
                            Floats* maxima) {
  const int64_t width = tensors.query.padded_width();
  const int64_t value_width = tensors.grad_out.padded_width();
  const int64_t key_stride = tensors.key.row_stride(), value_stride = tensors.value.row_stride();
  const float* const query_panel = scratch.query_panels + column * width * kColumn;
  const float* const grad_panel = scratch.grad_out_panels + column * value_width * kColumn;
  for (int64_t row = begin; row < end; row += kRows) {
    const Block<2> logits = visible_logits(scratch.key_rows + row * key_stride, key_stride,
                                           query_panel, width, row, visible);
    store_block(logits, scratch.probabilities + row * kTile + column * kColumn, kTile);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int vector = 0; vector < 2; ++vector) {
        maxima[vector] = maximum(logits.sums[i][vector], maxima[vector]);
      }
    }
    const Block<2> grads = product_in_parts<Left::kRowByRow, 2>(
        scratch.value_rows + row * value_stride, value_stride, grad_panel, kColumn, value_width);
    store_block(grads, scratch.grad_logits + row * kTile + column * kColumn, kTile);
  }
}

// Replaces logits by probabilities, and the gradients of probabilities by those of scaled logits,
// P * (dP - sum of P * dP). The output's product with its gradient is the same sum but for
// rounding, which would be most of the difference where one key has nearly all the weight.
inline void backward_softmax(const BackwardScratch& scratch, int column, int64_t begin, int64_t end,
                             float scale, const Floats* maxima) {
  float* const probabilities = scratch.probabilities + column * kColumn;
  float* const grad_logits = scratch.grad_logits + column * kColumn;
  Floats subtracted[2], sums[2] = {}, deltas[2] = {};
#pragma GCC unroll 2
  for (int vector = 0; vector < 2; ++vector) {
    // Where nothing is visible, exp(-inf - 0) is the zero wanted.
    subtracted[vector] = maxima[vector] == -kInfinity ? Floats{} : maxima[vector];
  }
  for (int64_t first = begin; first < end; first += kPartTerms) {
    Floats part_sums[2] = {}, part_deltas[2] = {};
    for (int64_t row = first; row < smaller(first + kPartTerms, end); ++row) {
#pragma GCC unroll 2
      for (int vector = 0; vector < 2; ++vector) {
        const int64_t place = row * kTile + vector * kVector;
        const Floats p = exponential((load(probabilities + place) - subtracted[vector]) * scale);
        part_sums[vector] += p;
        part_deltas[vector] += p * load(grad_logits + place);
        store(probabilities + place, p);
      }
    }
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; ++vector) {
      sums[vector] += part_sums[vector];
      deltas[vector] += part_deltas[vector];
    }
  }
#pragma GCC unroll 2
  for (int vector = 0; vector < 2; ++vector) {
    // Zero divided by one where nothing is visible.
    sums[vector] = sums[vector] == 0.0f ? broadcast(1.0f) : sums[vector];
    deltas[vector] /= sums[vector];
  }
  for (int64_t row = begin; row < end; ++row) {
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; ++vector) {
      const int64_t place = row * kTile + vector * kVector;
      const Floats p = load(probabilities + place) / sums[vector];
      store(probabilities + place, p);
      store(grad_logits + place, p * (load(grad_logits + place) - deltas[vector]));
    }
  }
}

// Zeros in a column of the rows from `begin` to `end`.
inline void clear_rows(float* column, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    __builtin_memset(column + row * kTile, 0, kColumn * sizeof(float));
  }
}

// Probabilities and gradients of the scaled logits of a tile of queries with the keys from `begin`
// to `end`, a range of whole blocks.
inline void backward_rows(const BackwardTensors& tensors, const BackwardScratch& scratch,
                          const QueryTile& queries, int64_t begin, int64_t end, float scale) {
  constexpr int kColumns = kTile / kColumn;
  Range seen[kColumns];
  Floats maxima[kColumns][2];
  for (int column = 0; column < kColumns; ++column) {
    const VisibleKeys& visible = queries.visible[column];
    seen[column].begin = clamp(visible.any_begin / kRows * kRows, begin, end);
    seen[column].end = clamp(round_up(visible.any_end, kRows), seen[column].begin, end);
    maxima[column][0] = maxima[column][1] = broadcast(-kInfinity);
    float* const both[] = {scratch.probabilities, scratch.grad_logits};
    for (float* const rows : both) {
      clear_rows(rows + column * kColumn, begin, seen[column].begin);
      clear_rows(rows + column * kColumn, seen[column].end, end);
    }
  }
  // Tile by tile, so that columns find keys and values in the cache.
  for (int64_t tile = begin; tile < end; tile += kTile) {
    for (int column = 0; column < kColumns; ++column) {
      backward_logits(tensors, scratch, queries.visible[column], column,
                      larger(tile, seen[column].begin), smaller(tile + kTile, seen[column].end),
                      maxima[column]);
    }
  }
  for (int column = 0; column < kColumns; ++column) {
    backward_softmax(scratch, column, seen[column].begin, seen[column].end, scale, maxima[column]);
  }
}

// One piece is a chunk of the queries that share a key head. A chunk's tiles lie `chunks` apart:
// under a causal mask late ones see more keys than early ones.
inline void backward_piece(const FlashAttentionProblem& problem, const BackwardTensors& tensors,
                           int64_t piece, float* scratch_data) {
  const BackwardScratch scratch(tensors, problem.padded_length(), scratch_data);
  const int64_t chunk = piece % tensors.chunks, key_head = piece / tensors.chunks;
  const int64_t sample = key_head / problem.key_heads;
  const HeadPositions keys = {sample, key_head % problem.key_heads, 0, problem.length};
  const int64_t key_stride = tensors.key.row_stride(), value_stride = tensors.value.row_stride();
  const int64_t width = tensors.query.padded_width();
  const int64_t value_width = tensors.grad_out.padded_width();
  const int64_t rows = problem.padded_length();
  read_rows(tensors.key, keys, rows, scratch.key_rows);
  read_rows(tensors.value, keys, rows, scratch.value_rows);
  __builtin_memset(scratch.grad_key_rows, 0, rows * key_stride * sizeof(float));
  __builtin_memset(scratch.grad_value_rows, 0, rows * value_stride * sizeof(float));

  const int64_t group = problem.query_heads / problem.key_heads, tiles = rows / kTile;
  for (int64_t i = chunk; i < group * tiles; i += tensors.chunks) {
    const int64_t first = i % tiles * kTile;
    const HeadPositions positions = {sample, keys.head * group + i / tiles, first,
                                     smaller(kTile, problem.length - first)};
    QueryTile queries;
    queries.of_queries(problem, sample, first);
    const int64_t begin = queries.any_begin / kRows * kRows;
    const int64_t end = round_up(queries.any_end, kRows);
    __builtin_memset(scratch.grad_query_rows, 0, kTile * key_stride * sizeof(float));
    if (begin < end) {
      read_queries(tensors, scratch, positions);
      backward_rows(tensors, scratch, queries, begin, end, problem.scale);
    }
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int64_t count = smaller(kTile, end - tile);
      const float* const grad_logits = scratch.grad_logits + tile * kTile;
      Range seen[kTile / kRows];
      queries.that_see(tile, count, seen);
      add_banded_product<Left::kRowByRow>(
          scratch.probabilities + tile * kTile, kTile, count, seen, scratch.grad_out_rows,
          scratch.grad_value_rows + tile * value_stride, value_stride, value_width);
      add_banded_product<Left::kRowByRow>(grad_logits, kTile, count, seen, scratch.query_rows,
                                          scratch.grad_key_rows + tile * key_stride, key_stride,
                                          width);
      queries.seen_keys(tile, count, seen);
      add_banded_product<Left::kColumnByColumn>(grad_logits, kTile, kTile, seen,
                                                scratch.key_rows + tile * key_stride,
                                                scratch.grad_query_rows, key_stride, width);
    }
    write_rows(scratch.grad_query_rows, problem.scale, tensors.grad_query, positions);
  }
  StridedTensor grad_key = tensors.grad_key, grad_value = tensors.grad_value;
  grad_key.data = static_cast<float*>(grad_key.data) + chunk * tensors.grad_key_stride;
  grad_value.data = static_cast<float*>(grad_value.data) + chunk * tensors.grad_value_stride;
  write_rows(scratch.grad_key_rows, problem.scale, grad_key, keys);
  write_rows(scratch.grad_value_rows, 1.0f, grad_value, keys);
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

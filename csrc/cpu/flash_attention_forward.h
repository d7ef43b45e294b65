// Forward pass of flash attention. Included once for each target, see vectors.h.
#pragma once

#include "visible_logits.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

constexpr int kForwardKeys = 128;  // keys of a tile

// Memory of one thread, cut from its scratch.
struct ForwardScratch {
  float* rows;         // kColumn of the query or of the output
  float* query_panel;  // [width, kColumn]
  float* logits;       // [kForwardKeys, kColumn]
  float* out;          // [value width, kColumn]

  ForwardScratch(const ForwardTensors& tensors, float* scratch)
      : rows(scratch),
        query_panel(rows + kColumn * larger(tensors.query.row_stride(), tensors.out.row_stride())),
        logits(query_panel + kColumn * tensors.query.padded_width()),
        out(logits + kColumn * kForwardKeys) {}
};

inline int64_t forward_scratch(const ForwardTensors& tensors) {
  float* const none = nullptr;
  return ForwardScratch(tensors, none).out - none + kColumn * tensors.out.padded_width();
}

// The softmax of a column's queries so far; `maxima` are those of unscaled logits.
struct RunningSoftmax {
  Floats maxima[2], sums[2], correction[2];

  // Turns `count` rows of unscaled logits [.., kColumn] into exponentials above new maxima, and
  // finds what corrects exponentials above the old ones.
  MEGATRON_KANANA_INLINE void update(float* logits, int64_t count, const Floats* tile_maxima,
                                     float scale) {
    Floats subtracted[2], tile_sums[2] = {};
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; ++vector) {
      const Floats before = maxima[vector];
      maxima[vector] = maximum(tile_maxima[vector], before);
      // Where nothing has been visible, exp(-inf - 0) is the zero wanted.
      subtracted[vector] = maxima[vector] == -kInfinity ? Floats{} : maxima[vector];
      correction[vector] = exponential((before - subtracted[vector]) * scale);
    }
    for (int64_t first = 0; first < count; first += kPartTerms) {
      const int64_t end = smaller(first + kPartTerms, count);
      Floats part_sums[2] = {};
      for (int64_t row = first; row < end; ++row) {
#pragma GCC unroll 2
        for (int vector = 0; vector < 2; ++vector) {
          float* const place = logits + row * kColumn + vector * kVector;
          const Floats p = exponential((load(place) - subtracted[vector]) * scale);
          part_sums[vector] += p;
          store(place, p);
        }
      }
#pragma GCC unroll 2
      for (int vector = 0; vector < 2; ++vector) tile_sums[vector] += part_sums[vector];
    }
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; ++vector) {
      sums[vector] = sums[vector] * correction[vector] + tile_sums[vector];
    }
  }
};

// Logarithms, the column's largest logit, and the quotients.
inline void finish_forward(const FlashAttentionProblem& problem, const ForwardTensors& tensors,
                           const ForwardScratch& scratch, const RunningSoftmax& softmax,
                           int64_t head, const HeadPositions& queries) {
  float maxima[kColumn], sums[kColumn];
  Floats divisors[2];
#pragma GCC unroll 2
  for (int vector = 0; vector < 2; ++vector) {
    store(maxima + vector * kVector, softmax.maxima[vector]);
    store(sums + vector * kVector, softmax.sums[vector]);
    // Zero divided by one where nothing is visible.
    divisors[vector] = softmax.sums[vector] == 0.0f ? broadcast(1.0f) : softmax.sums[vector];
  }
  float largest = -kInfinity;
  for (int64_t lane = 0; lane < queries.count; ++lane) {
    const float sum = sums[lane];
    tensors.logsumexp[head * problem.length + queries.first + lane] =
        sum == 0.0f ? -kInfinity : maxima[lane] * problem.scale + __builtin_logf(sum);
    // NaN logits make the sum NaN, but `maximum` passes over them; infinite ones do so as well.
    const bool has_nan = sum != sum && maxima[lane] < kInfinity;
    const float lane_maximum = has_nan ? sum : maxima[lane] * problem.scale;
    if (largest == largest && !(lane_maximum <= largest)) largest = lane_maximum;
  }
  const int64_t columns = problem.padded_length() / kColumn;
  tensors.max_logits[head * columns + queries.first / kColumn] = largest;

  const int64_t width = tensors.out.padded_width(), stride = tensors.out.row_stride();
  for (int64_t row = 0; row < width; ++row) {
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; ++vector) {
      float* const place = scratch.out + row * kColumn + vector * kVector;
      store(place, load(place) / divisors[vector]);
    }
  }
  for (int64_t row = 0; row < width; row += kVector) {
    for (int64_t lane = 0; lane < kColumn; lane += kVector) {
      transpose(scratch.out + row * kColumn + lane, kColumn, scratch.rows + lane * stride + row,
                stride);
    }
  }
  write_rows(scratch.rows, 1.0f, tensors.out, queries);
}

// One piece is a column of queries of one head, long ones first.
inline void forward_piece(const FlashAttentionProblem& problem, const ForwardTensors& tensors,
                          int64_t piece, float* scratch_data) {
  const ForwardScratch scratch(tensors, scratch_data);
  const int64_t columns = problem.padded_length() / kColumn;
  const int64_t head = piece / columns, first = (columns - 1 - piece % columns) * kColumn;
  const int64_t sample = head / problem.query_heads;
  const int64_t key_head = head / (problem.query_heads / problem.key_heads);
  const int64_t width = tensors.query.padded_width(), value_width = tensors.out.padded_width();
  const int64_t key_stride = tensors.key.row_stride(), value_stride = tensors.value.row_stride();
  const float* const keys = tensors.key_rows + key_head * problem.padded_length() * key_stride;
  const float* const values =
      tensors.value_rows + key_head * problem.padded_length() * value_stride;
  const HeadPositions queries = {sample, head % problem.query_heads, first,
                                 clamp(problem.length - first, 0, kColumn)};

  VisibleKeys visible;
  visible.of_queries(problem, sample, first);
  read_rows(tensors.query, queries, kColumn, scratch.rows);
  transpose_panels(scratch.rows, tensors.query.row_stride(), kColumn, width, scratch.query_panel);
  __builtin_memset(scratch.out, 0, value_width * kColumn * sizeof(float));
  RunningSoftmax softmax = {};
  softmax.maxima[0] = softmax.maxima[1] = broadcast(-kInfinity);

  for (int64_t tile = visible.any_begin / kRows * kRows; tile < visible.any_end;
       tile += kForwardKeys) {
    const int64_t count = smaller(kForwardKeys, round_up(visible.any_end - tile, kRows));
    Floats tile_maxima[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
    for (int64_t row = 0; row < count; row += kRows) {
      const Block<2> block = visible_logits(keys + (tile + row) * key_stride, key_stride,
                                            scratch.query_panel, width, tile + row, visible);
      store_block(block, scratch.logits + row * kColumn, kColumn);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int vector = 0; vector < 2; ++vector) {
          tile_maxima[vector] = maximum(block.sums[i][vector], tile_maxima[vector]);
        }
      }
    }
    softmax.update(scratch.logits, count, tile_maxima, problem.scale);
    for (int64_t row = 0; row < value_width; row += kRows) {
      const Block<2> block = product_in_parts<Left::kColumnByColumn, 2>(
          values + tile * value_stride + row, value_stride, scratch.logits, kColumn, count);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int vector = 0; vector < 2; ++vector) {
          float* const place = scratch.out + (row + i) * kColumn + vector * kVector;
          store(place, load(place) * softmax.correction[vector] + block.sums[i][vector]);
        }
      }
    }
  }
  finish_forward(problem, tensors, scratch, softmax, head, queries);
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

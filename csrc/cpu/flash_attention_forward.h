// Forward pass of flash attention. Included once for each target, see vectors.h.
#pragma once

#include "visible_logits.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

constexpr int kForwardKeys = 128;  // keys of a tile

inline int64_t forward_scratch(const ForwardBuffers& buffers) {
  return kColumn * (buffers.query.width + kForwardKeys + buffers.value.width);
}

// The softmax of a column's queries so far.
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
      maxima[vector] = maximum(tile_maxima[vector] * scale, before);
      // Where nothing has been visible, exp(-inf - 0) is the zero wanted.
      subtracted[vector] = maxima[vector] == -kInfinity ? Floats{} : maxima[vector];
      correction[vector] = exponential(before - subtracted[vector]);
    }
    for (int64_t row = 0; row < count; ++row) {
#pragma GCC unroll 2
      for (int vector = 0; vector < 2; ++vector) {
        float* const place = logits + row * kColumn + vector * kVector;
        const Floats p = exponential(load(place) * scale - subtracted[vector]);
        tile_sums[vector] += p;
        store(place, p);
      }
    }
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; ++vector) {
      sums[vector] = sums[vector] * correction[vector] + tile_sums[vector];
    }
  }
};

// Logarithms, the column's largest logit, and the quotients `out` [value width, kColumn] to its
// rows.
inline void finish_forward(const FlashAttentionProblem& problem, const ForwardBuffers& buffers,
                           const RunningSoftmax& softmax, int64_t head, int64_t first, float* out) {
  float maxima[kColumn], sums[kColumn];
  Floats factors[2];
#pragma GCC unroll 2
  for (int vector = 0; vector < 2; ++vector) {
    store(maxima + vector * kVector, softmax.maxima[vector]);
    store(sums + vector * kVector, softmax.sums[vector]);
    factors[vector] = softmax.sums[vector] == 0.0f ? Floats{} : 1.0f / softmax.sums[vector];
  }
  float largest = -kInfinity;
  const int64_t lanes = smaller(kColumn, problem.length - first);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const float sum = sums[lane];
    buffers.logsumexp[head * problem.length + first + lane] =
        sum == 0.0f ? -kInfinity : maxima[lane] + __builtin_logf(sum);
    // NaN logits make the sum NaN, but `maximum` passes over them; infinite ones do so as well.
    const bool has_nan = sum != sum && maxima[lane] < kInfinity;
    const float lane_maximum = has_nan ? sum : maxima[lane];
    if (largest == largest && !(lane_maximum <= largest)) largest = lane_maximum;
  }
  const int64_t column = first / kColumn;
  buffers.max_logits[head * (problem.padded_length() / kColumn) + column] = largest;

  float* const rows = buffers.out.of_head(problem, head) + first * buffers.out.stride;
  for (int64_t row = 0; row < buffers.out.width; ++row) {
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; ++vector) {
      float* const place = out + row * kColumn + vector * kVector;
      store(place, load(place) * factors[vector]);
    }
  }
  for (int64_t row = 0; row < buffers.out.width; row += kVector) {
    for (int64_t lane = 0; lane < kColumn; lane += kVector) {
      transpose(out + row * kColumn + lane, kColumn, rows + lane * buffers.out.stride + row,
                buffers.out.stride);
    }
  }
}

// One piece is a column of queries of one head.
inline void forward_piece(const FlashAttentionProblem& problem, const ForwardBuffers& buffers,
                          int64_t piece, float* scratch) {
  const int64_t pieces = problem.padded_length() / kColumn;
  const int64_t head = piece / pieces, first = (pieces - 1 - piece % pieces) * kColumn;
  const int64_t sample = head / problem.query_heads;
  const int64_t group = problem.query_heads / problem.key_heads;
  const int64_t width = buffers.query.width, value_width = buffers.value.width;
  float* const panel = scratch;
  float* const logits = panel + width * kColumn;
  float* const out = logits + kForwardKeys * kColumn;  // [value_width, kColumn]
  const float* const keys = buffers.key.of_head(problem, head / group);
  const float* const values = buffers.value.of_head(problem, head / group);

  VisibleKeys visible;
  visible.of_queries(problem, sample, first);
  transpose_panels(buffers.query.of_head(problem, head) + first * buffers.query.stride,
                   buffers.query.stride, kColumn, width, panel);
  __builtin_memset(out, 0, value_width * kColumn * sizeof(float));
  RunningSoftmax softmax = {};
  softmax.maxima[0] = softmax.maxima[1] = broadcast(-kInfinity);

  for (int64_t tile = visible.any_begin / kRows * kRows; tile < visible.any_end;
       tile += kForwardKeys) {
    const int64_t count =
        smaller(kForwardKeys, (visible.any_end - tile + kRows - 1) / kRows * kRows);
    Floats tile_maxima[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
    for (int64_t row = 0; row < count; row += kRows) {
      const Block<2> block = visible_logits(keys + (tile + row) * buffers.key.stride,
                                            buffers.key.stride, panel, width, tile + row, visible);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int vector = 0; vector < 2; ++vector) {
          tile_maxima[vector] = maximum(block.sums[i][vector], tile_maxima[vector]);
          store(logits + (row + i) * kColumn + vector * kVector, block.sums[i][vector]);
        }
      }
    }
    softmax.update(logits, count, tile_maxima, problem.scale);
    for (int64_t row = 0; row < value_width; row += kRows) {
      const Block<2> block = block_product<Left::kColumnByColumn, 2>(
          values + tile * buffers.value.stride + row, buffers.value.stride, logits, kColumn, count);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int vector = 0; vector < 2; ++vector) {
          float* const place = out + (row + i) * kColumn + vector * kVector;
          store(place, load(place) * softmax.correction[vector] + block.sums[i][vector]);
        }
      }
    }
  }

  finish_forward(problem, buffers, softmax, head, first, out);
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

// Products of small fp32 matrices, a block of rows and vectors in registers at a time. Included
// once for each target, see vectors.h.
#pragma once

#include "vectors.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

constexpr int kRows = MEGATRON_KANANA_ROWS;  // rows of a block
constexpr int kColumn = 2 * kVector;         // floats in a row of a block

// How the left matrix lies in memory.
enum class Left { kRowByRow, kColumnByColumn };

// A block of sums, in registers once everything is inlined.
template <int kVectors>
struct Block {
  Floats sums[kRows][kVectors];
};

// sum over k < depth of left(row, k) * right[k * right_stride ...].
// left(row, k) is left[row * left_stride + k], or left[k * left_stride + row].
template <Left kLeft, int kVectors>
MEGATRON_KANANA_INLINE Block<kVectors> block_product(const float* left, int64_t left_stride,
                                                     const float* right, int64_t right_stride,
                                                     int64_t depth) {
  Block<kVectors> block = {};
  const float* rows[kRows];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    rows[row] = left + (kLeft == Left::kRowByRow ? row * left_stride : row);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats factors[kVectors];
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) {
      factors[vector] = load(right + k * right_stride + vector * kVector);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const float factor = rows[row][kLeft == Left::kRowByRow ? k : k * left_stride];
#pragma GCC unroll 2
      for (int vector = 0; vector < kVectors; ++vector) {
        block.sums[row][vector] += factors[vector] * factor;
      }
    }
  }
  return block;
}

// Terms of a part of a sum: the square root of usual depths, where parts and whole are as long.
constexpr int64_t kPartTerms = 16;

// The same product, summed up in parts that are added: the rounding errors of one long sum grow
// with its length. Costs a twentieth more time.
template <Left kLeft, int kVectors>
MEGATRON_KANANA_INLINE Block<kVectors> product_in_parts(const float* left, int64_t left_stride,
                                                        const float* right, int64_t right_stride,
                                                        int64_t depth) {
  Block<kVectors> whole = {};
  for (int64_t k = 0; k < depth; k += kPartTerms) {
    const int64_t terms = depth - k < kPartTerms ? depth - k : kPartTerms;
    const Block<kVectors> part =
        block_product<kLeft, kVectors>(left + (kLeft == Left::kRowByRow ? k : k * left_stride),
                                       left_stride, right + k * right_stride, right_stride, terms);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
      for (int vector = 0; vector < kVectors; ++vector) {
        whole.sums[row][vector] += part.sums[row][vector];
      }
    }
  }
  return whole;
}

template <int kVectors>
MEGATRON_KANANA_INLINE void store_block(const Block<kVectors>& block, float* target,
                                        int64_t stride) {
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) {
      store(target + row * stride + vector * kVector, block.sums[row][vector]);
    }
  }
}

template <int kVectors>
MEGATRON_KANANA_INLINE void add_block(const Block<kVectors>& block, float* sums, int64_t stride) {
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; ++vector) {
      float* const place = sums + row * stride + vector * kVector;
      store(place, load(place) + block.sums[row][vector]);
    }
  }
}

struct Range {
  int64_t begin, end;
};

// One column of the product below.
template <Left kLeft, int kVectors>
MEGATRON_KANANA_INLINE void add_banded_column(const float* left, int64_t left_stride, int64_t count,
                                              const Range* bands, const float* right, float* sums,
                                              int64_t stride) {
  for (int64_t row = 0; row < count; row += kRows) {
    const Range band = bands[row / kRows];
    if (band.begin >= band.end) continue;
    const float* const block_left = kLeft == Left::kRowByRow
                                        ? left + row * left_stride + band.begin
                                        : left + band.begin * left_stride + row;
    add_block(
        product_in_parts<kLeft, kVectors>(block_left, left_stride, right + band.begin * stride,
                                          stride, band.end - band.begin),
        sums + row * stride, stride);
  }
}

// sums += left @ right for `count` rows of `left`, where each block of kRows of them has columns
// other than zero in its band alone. `sums` and `right` have rows of `width`, a multiple of
// kVector, `stride` apart; `count` is a multiple of kRows.
template <Left kLeft>
inline void add_banded_product(const float* left, int64_t left_stride, int64_t count,
                               const Range* bands, const float* right, float* sums, int64_t stride,
                               int64_t width) {
  int64_t column = 0;
  for (; column + kColumn <= width; column += kColumn) {
    add_banded_column<kLeft, 2>(left, left_stride, count, bands, right + column, sums + column,
                                stride);
  }
  if (column < width) {
    add_banded_column<kLeft, 1>(left, left_stride, count, bands, right + column, sums + column,
                                stride);
  }
}

// Panels of kColumn rows of `rows` [count, width], each panel transposed: [width, kColumn].
// `count` is a multiple of kColumn and `width` of kVector.
MEGATRON_KANANA_INLINE void transpose_panels(const float* rows, int64_t stride, int64_t count,
                                             int64_t width, float* panels) {
  for (int64_t first = 0; first < count; first += kVector) {
    float* const panel = panels + first / kColumn * width * kColumn + first % kColumn;
    for (int64_t column = 0; column < width; column += kVector) {
      transpose(rows + first * stride + column, stride, panel + column * kColumn, kColumn);
    }
  }
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

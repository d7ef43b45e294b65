// Rows in fp32 of tensors in fp32 or bf16, weights in panels, and products with them. Included once
// for each target, see vectors.h.
//
// A panel holds kColumn columns of a right factor, its rows one behind another, so that a product
// reads it from the first byte to the last.
#pragma once

#include "elements.h"
#include "matrix_product.h"
#include "moe_experts.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

// Rows of a panel that a block of products goes through at once: they stay in the first cache.
constexpr int64_t kDepth = 128;

MEGATRON_KANANA_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// A matrix of weights [rows, columns] in two halves of rows, each padded with zeros to
// `padded_half` rows; or in one, `halves` = 1.
struct WeightMatrix {
  const void* data;
  Dtype dtype;
  int64_t offset;  // of the first element
  int64_t half;    // rows of a half
  int64_t padded_half;
  int64_t columns;

  // Row `row` of the padded matrix, from column `first` on: `count` elements, zeros behind the
  // last.
  void read(int64_t row, int64_t first, int64_t count, float* target) const {
    const int64_t within = row % padded_half;
    const int64_t present = within < half ? least(count, columns - first) : 0;
    const int64_t source = offset + (row / padded_half * half + within) * columns + first;
    read_row(data, dtype, present > 0 ? source : 0, present > 0 ? present : 0, count, target);
  }
};

// Panel of the matrix's columns from `panel` * kColumn on: all padded rows.
inline void pack_panel(const WeightMatrix& matrix, int64_t padded_rows, int64_t panel,
                       float* panels) {
  float* const target = panels + panel * padded_rows * kColumn;
  for (int64_t row = 0; row < padded_rows; ++row) {
    matrix.read(row, panel * kColumn, kColumn, target + row * kColumn);
  }
}

// Panel of the transposed matrix: its columns are the padded rows from `panel` * kColumn on.
inline void pack_transposed_panel(const WeightMatrix& matrix, int64_t panel, float* panels) {
  float* const target = panels + panel * matrix.columns * kColumn;
  float tile[kVector * kVector], transposed[kVector * kVector];
  for (int64_t column = 0; column < kColumn; column += kVector) {
    for (int64_t k = 0; k < matrix.columns; k += kVector) {
      for (int64_t row = 0; row < kVector; ++row) {
        matrix.read(panel * kColumn + column + row, k, kVector, tile + row * kVector);
      }
      transpose(tile, kVector, transposed, kVector);
      const int64_t depth = least(kVector, matrix.columns - k);
      for (int64_t i = 0; i < depth; ++i) {
        store(target + (k + i) * kColumn + column, load(transposed + i * kVector));
      }
    }
  }
}

// sums = left @ right, with a right factor of `depth` rows and `width` columns, a multiple of
// kColumn, in panels `panel_stride` apart whose rows are `right_stride` apart. `rows` is a multiple
// of kRows.
template <Left kLeft>
inline void product(const float* left, int64_t left_stride, int64_t rows, const float* right,
                    int64_t right_stride, int64_t panel_stride, int64_t depth, int64_t width,
                    float* sums, int64_t sums_stride) {
  for (int64_t first = 0; first < depth; first += kDepth) {
    const int64_t count = least(kDepth, depth - first);
    for (int64_t panel = 0; panel < width / kColumn; ++panel) {
      const float* const factors = right + panel * panel_stride + first * right_stride;
      for (int64_t row = 0; row < rows; row += kRows) {
        const float* const rows_left = kLeft == Left::kRowByRow ? left + row * left_stride + first
                                                                : left + first * left_stride + row;
        const Block<2> block =
            block_product<kLeft, 2>(rows_left, left_stride, factors, right_stride, count);
        float* const place = sums + row * sums_stride + panel * kColumn;
        if (first == 0) {
          store_block(block, place, sums_stride);
        } else {
          add_block(block, place, sums_stride);
        }
      }
    }
  }
}

// The same with weights in panels.
inline void product_with_panels(const float* left, int64_t left_stride, int64_t rows,
                                const float* panels, int64_t depth, int64_t width, float* sums,
                                int64_t sums_stride) {
  product<Left::kRowByRow>(left, left_stride, rows, panels, kColumn, depth * kColumn, depth, width,
                           sums, sums_stride);
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

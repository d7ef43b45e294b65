// Quantisation to 8 bits (e4m3) in blocks of 128 numbers, in the order of rows, of columns, or
// both: tensor cores sum along rows alone.
#pragma once

#include <cstdint>

namespace megatron_kanana {

constexpr int kFp8BlocksUnit = 128;  // rows and columns are multiples of it

// Of values bf16 [rows, columns]. A block's scale is the largest power of two with which its
// largest magnitude is not beyond the format's; that of a block of zeros, and of one with an
// infinity, is one. Either order is left out where both of its pointers are null.
struct Fp8Blocks {
  const void* values;
  int64_t rows;
  int64_t columns;
  void* data;                        // 8 bits [rows, columns], in blocks along a row
  float* inverse_scales;             // [columns / 128, rows], by which they are multiplied
  void* transposed;                  // 8 bits [columns, rows], in blocks along a column
  float* transposed_inverse_scales;  // [rows / 128, columns]
};

void fp8_quantize_blocks(const Fp8Blocks& blocks, void* stream);

}  // namespace megatron_kanana

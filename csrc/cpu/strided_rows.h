// Copies between tensors of any strides, in fp32 or bf16, and rows of fp32 for products of
// matrices. Free of torch headers.
#pragma once

#include <cstdint>

namespace megatron_kanana::cpu {

// Rows are padded with zeros to multiples of this.
constexpr int64_t kWidthUnit = 16;

enum class Dtype { kFloat32, kBfloat16 };

// A tensor [sequence, batch, heads, width], strides in elements, the last one 1.
struct StridedTensor {
  void* data;
  Dtype dtype;
  int64_t sequence_stride;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t width;

  int64_t padded_width() const { return (width + kWidthUnit - 1) / kWidthUnit * kWidthUnit; }
  // Floats from one row of a copy to the next: an odd multiple of a cache line, because rows at
  // other distances share few sets of the cache.
  int64_t row_stride() const { return padded_width() | kWidthUnit; }
};

// Positions [first, first + count) of one head.
struct HeadPositions {
  int64_t sample;
  int64_t head;
  int64_t first;
  int64_t count;
};

// Copies positions to rows `tensor.row_stride()` apart, and zeros to the rows from `count` to
// `rows`.
void read_rows(const StridedTensor& tensor, const HeadPositions& positions, int64_t rows,
               float* target);

// Copies `factor` times the rows, `tensor.row_stride()` apart, to their positions. Bf16 is rounded
// to the nearest, ties to even.
void write_rows(const float* source, float factor, const StridedTensor& tensor,
                const HeadPositions& positions);

}  // namespace megatron_kanana::cpu

#include "strided_rows.h"

#include <algorithm>
#include <bit>

namespace megatron_kanana::cpu {
namespace {

float to_float(float value) { return value; }

float to_float(uint16_t bfloat16) {
  return std::bit_cast<float>(static_cast<uint32_t>(bfloat16) << 16);
}

void from_float(float value, float& target) { target = value; }

// To the nearest, ties to even; NaN stays NaN.
void from_float(float value, uint16_t& target) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  target = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// Calls visit(i, elements) with a typed pointer to the elements of each position in turn.
template <class Visit>
void for_each_row(const StridedTensor& tensor, const HeadPositions& positions, const Visit& visit) {
  const int64_t offset = positions.first * tensor.sequence_stride +
                         positions.sample * tensor.batch_stride +
                         positions.head * tensor.head_stride;
  const auto visit_all = [&](auto* data) {
    for (int64_t i = 0; i < positions.count; ++i) {
      visit(i, data + offset + i * tensor.sequence_stride);
    }
  };
  if (tensor.dtype == Dtype::kFloat32) {
    visit_all(static_cast<float*>(tensor.data));
  } else {
    visit_all(static_cast<uint16_t*>(tensor.data));
  }
}

}  // namespace

void read_rows(const StridedTensor& tensor, const HeadPositions& positions, int64_t rows,
               float* target) {
  const int64_t stride = tensor.row_stride();
  for_each_row(tensor, positions, [&](int64_t i, const auto* elements) {
    float* const row = target + i * stride;
    for (int64_t column = 0; column < tensor.width; ++column) {
      row[column] = to_float(elements[column]);
    }
    std::fill(row + tensor.width, row + tensor.padded_width(), 0.0f);
  });
  std::fill(target + positions.count * stride, target + rows * stride, 0.0f);
}

void write_rows(const float* source, float factor, const StridedTensor& tensor,
                const HeadPositions& positions) {
  for_each_row(tensor, positions, [&](int64_t i, auto* elements) {
    const float* const row = source + i * tensor.row_stride();
    for (int64_t column = 0; column < tensor.width; ++column) {
      from_float(factor * row[column], elements[column]);
    }
  });
}

}  // namespace megatron_kanana::cpu

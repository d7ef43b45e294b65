// Quantisation with a scale a block, for Hopper GPUs alone. Nothing here waits for the device.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../kernels/fp8_quantize_blocks.h"
#include "cuda_stream.h"

namespace megatron_kanana {
namespace {

constexpr int64_t kRowsMax = int64_t{1} << 23;  // a launch has at most 65,535 rows of tiles
constexpr int64_t kColumnsMax = int64_t{1} << 30;

void check_values(const at::Tensor& values) {
  TORCH_CHECK(values.dim() >= 2, "values must have shape [..., columns], got ", values.sizes());
  TORCH_CHECK(values.scalar_type() == at::kBFloat16, "values must be bfloat16, got ",
              values.scalar_type());
  TORCH_CHECK(values.is_contiguous(), "values must be contiguous, got strides ", values.strides());
  TORCH_CHECK(reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 == 0,
              "values must begin at a multiple of 16 bytes");
  TORCH_CHECK(values.numel() > 0, "values must not be empty, got shape ", values.sizes());
  const int64_t columns = values.size(-1), rows = values.numel() / columns;
  TORCH_CHECK(rows % kFp8BlocksUnit == 0 && columns % kFp8BlocksUnit == 0,
              "rows and columns of values must be multiples of ", kFp8BlocksUnit, ", got ", rows,
              " and ", columns);
  TORCH_CHECK(rows < kRowsMax && columns < kColumnsMax, "values must have fewer than ", kRowsMax,
              " rows and ", kColumnsMax, " columns, got ", rows, " and ", columns);
}

// The last dimension first, the others as they are.
at::DimVector transposed_shape(const at::Tensor& values) {
  at::DimVector shape(values.sizes().begin(), values.sizes().end());
  std::rotate(shape.begin(), shape.end() - 1, shape.end());
  return shape;
}

// The numbers of one order and their multipliers, or nothing.
struct Quantized {
  at::Tensor data, inverse_scales;

  Quantized(const at::Tensor& values, bool wanted, at::IntArrayRef shape, int64_t blocks,
            int64_t lines) {
    const at::DimVector none = {0}, scales = {blocks, lines};
    data = at::empty(wanted ? shape : none, values.options().dtype(at::kByte));
    inverse_scales = at::empty(wanted ? scales : none, values.options().dtype(at::kFloat));
  }

  void* numbers() { return data.numel() > 0 ? data.mutable_data_ptr() : nullptr; }
  float* scales() { return data.numel() > 0 ? inverse_scales.mutable_data_ptr<float>() : nullptr; }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fp8_quantize_blocks_cuda(
    const at::Tensor& values, bool rowwise, bool columnwise) {
  check_values(values);
  const c10::DeviceGuard guard(values.device());
  const int64_t columns = values.size(-1), rows = values.numel() / columns;
  Quantized by_row(values, rowwise, values.sizes(), columns / kFp8BlocksUnit, rows);
  Quantized by_column(values, columnwise, transposed_shape(values), rows / kFp8BlocksUnit, columns);
  const Fp8Blocks blocks = {
      values.const_data_ptr(),
      rows,
      columns,
      by_row.numbers(),
      by_row.scales(),
      by_column.numbers(),
      by_column.scales(),
  };
  fp8_quantize_blocks(blocks, current_stream(values));
  return {by_row.data, by_row.inverse_scales, by_column.data, by_column.inverse_scales};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_kanana, library) {
  library.def(
      "fp8_quantize_blocks(Tensor values, bool rowwise, bool columnwise) -> "
      "(Tensor data, Tensor inverse_scales, Tensor transposed, Tensor transposed_inverse_scales)");
}

TORCH_LIBRARY_IMPL(megatron_kanana, CUDA, library) {
  library.impl("fp8_quantize_blocks", fp8_quantize_blocks_cuda);
}

}  // namespace megatron_kanana

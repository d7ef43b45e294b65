// Backward through the experts' down projection and activation, of gathered rows of grad_out.
#include <cuda_runtime.h>

#include "sm90_experts_down_backward.cuh"
#include "sm90_experts_launch.h"

namespace megatron_kanana {
namespace sm90 {
namespace {

using Epilogue = DownBackward<192, NoQuantization>;

int column_tiles_of(int width) { return (width + Epilogue::kColumns - 1) / Epilogue::kColumns; }

}  // namespace
}  // namespace sm90

int experts_grad_weight_parts(const ExpertSizes& sizes) {
  return sm90::column_tiles_of(sizes.width);
}

void experts_down_backward(const ExpertSizes& sizes, const ExpertRows& rows, const void* grad_out,
                           const void* down, const void* pre_activation, void* grad_pre_activation,
                           void* weighted_activation, float* grad_weight_parts, void* stream) {
  using namespace sm90;
  using Matmul = RowMatmul<true, true, 5, Epilogue>;
  if (sizes.rows == 0) return;
  enter_device();
  const int width = sizes.width, column_tiles = column_tiles_of(width);
  const auto half_map = [&](int first_column) {
    return ordered_rows_map(columns_from(pre_activation, first_column), sizes.rows, width,
                            2 * width, kStoredRows);
  };
  const auto half_rows = [&](int first_column) {
    return open_rows(columns_from(grad_pre_activation, first_column), sizes.rows, width, 2 * width);
  };
  launch_row_matmul<Matmul>(
      {
          .a = {},
          .b = weights_map(down, sizes.experts, sizes.hidden_size, width, kDepth),
          .gathered = gathered_rows(sizes, rows, grad_out),
          .groups = row_groups(sizes, rows),
          .depth = sizes.hidden_size,
          .column_tiles = column_tiles,
          .second_half = 0,
          .epilogue = {.pre_activation = {.gate = half_map(0), .up = half_map(width)},
                       .grad_gate = half_rows(0),
                       .grad_up = half_rows(width),
                       .activation = open_rows(weighted_activation, sizes.rows, width, width),
                       .weights = rows.weights,
                       .slot_of_row = rows.slot_of_row,
                       .grad_weight_parts = grad_weight_parts,
                       .column_tiles = column_tiles,
                       .quantization = {}},
      },
      "experts_down_backward", stream);
}

}  // namespace megatron_kanana

// The experts' fp8 products of rows in order that need nothing but their result, in bf16.
#include <cuda_runtime.h>

#include "sm90_experts_store_rows.cuh"
#include "sm90_fp8_experts_launch.h"

namespace megatron_kanana {
namespace sm90 {
namespace {

void launch(const ExpertSizes& sizes, const ExpertRows& rows, const Fp8Rows& a, int depth,
            const void* b, const Scales& scales, void* out, const char* name, void* stream) {
  using Matmul = Fp8RowMatmul<false, 3, StoreRows>;
  const int width = sizes.hidden_size;
  Matmul::Arguments arguments;
  set_rows<Matmul>(arguments, sizes, rows, a.data, depth);
  arguments.b = weights_map(b, sizes.experts, width, depth / 2, StoreRows::kColumns / 2);
  arguments.column_tiles = (width + StoreRows::kColumns - 1) / StoreRows::kColumns;
  arguments.second_half = StoreRows::kColumns / 2;
  arguments.epilogue = {.out = open_rows(out, sizes.rows, width, width)};
  arguments.scales = scales;
  launch_fp8_row_matmul<Matmul>(arguments, name, stream);
}

}  // namespace
}  // namespace sm90

void fp8_experts_down_forward(const ExpertSizes& sizes, const ExpertRows& rows,
                              const Fp8Rows& activation, const Fp8Weights& down, void* out,
                              void* stream) {
  using namespace sm90;
  if (sizes.rows == 0) return;
  enter_device();
  const Scales scales =
      scales_of(activation.scales, down.scales, sizes.hidden_size, sizes.width, false);
  launch(sizes, rows, activation, sizes.width, down.data, scales, out, "fp8_experts_down_forward",
         stream);
}

void fp8_experts_up_backward(const ExpertSizes& sizes, const ExpertRows& rows,
                             const Fp8Rows& grad_pre_activation, const Fp8Weights& gate_up,
                             void* grad_rows, void* stream) {
  using namespace sm90;
  if (sizes.rows == 0) return;
  enter_device();
  const int depth = 2 * sizes.width;
  const Scales scales =
      scales_of(grad_pre_activation.scales, gate_up.scales, depth, sizes.hidden_size, true);
  launch(sizes, rows, grad_pre_activation, depth, gate_up.data, scales, grad_rows,
         "fp8_experts_up_backward", stream);
}

}  // namespace megatron_kanana

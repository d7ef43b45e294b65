// The experts' products of rows in order that need nothing but their result: the down projection
// forward, and the gate and up projections backward.
#include <cuda_runtime.h>

#include "sm90_experts_launch.h"
#include "sm90_experts_store_rows.cuh"

namespace megatron_kanana {
namespace sm90 {
namespace {

template <bool kTransposeB>
void launch(const ExpertSizes& sizes, const ExpertRows& rows, const void* a, int depth,
            const CUtensorMap& b, void* out, const char* name, void* stream) {
  const int width = sizes.hidden_size;
  launch_row_matmul<RowMatmul<false, kTransposeB, 3, StoreRows>>(
      {
          .a = ordered_rows_map(a, sizes.rows, depth, depth, kTileRows),
          .b = b,
          .gathered = {},
          .groups = row_groups(sizes, rows),
          .depth = depth,
          .column_tiles = (width + StoreRows::kColumns - 1) / StoreRows::kColumns,
          .second_half = StoreRows::kColumns / 2,
          .epilogue = {.out = open_rows(out, sizes.rows, width, width)},
      },
      name, stream);
}

}  // namespace
}  // namespace sm90

void experts_down_forward(const ExpertSizes& sizes, const ExpertRows& rows, const void* activation,
                          const void* down, void* out, void* stream) {
  using namespace sm90;
  if (sizes.rows == 0) return;
  enter_device();
  const auto weights =
      weights_map(down, sizes.experts, sizes.hidden_size, sizes.width, StoreRows::kColumns / 2);
  launch<false>(sizes, rows, activation, sizes.width, weights, out, "experts_down_forward", stream);
}

void experts_up_backward(const ExpertSizes& sizes, const ExpertRows& rows,
                         const void* grad_pre_activation, const void* gate_up, void* grad_rows,
                         void* stream) {
  using namespace sm90;
  if (sizes.rows == 0) return;
  enter_device();
  const auto weights =
      weights_map(gate_up, sizes.experts, 2 * sizes.width, sizes.hidden_size, kDepth);
  launch<true>(sizes, rows, grad_pre_activation, 2 * sizes.width, weights, grad_rows,
               "experts_up_backward", stream);
}

}  // namespace megatron_kanana

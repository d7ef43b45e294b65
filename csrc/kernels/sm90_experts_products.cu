// The experts' products of rows in order that need nothing but their result: the down projection
// forward, and the gate and up projections backward.
#include <cuda_runtime.h>

#include "sm90_experts_launch.h"

namespace megatron_kanana {
namespace sm90 {
namespace {

class StoreRows {
 public:
  static constexpr int kColumns = 256;
  static constexpr int kColumnStep = kColumns;

  static constexpr int kLoadedStages = 0;

  struct Arguments {
    StoredRows out;
  };
  struct Shared {
    uint8_t staged[2][kStagedBytes];
  };

  __device__ StoreRows(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments), staged_(shared.staged, 1 + warpgroup) {}

  __device__ __forceinline__ void begin(const RowTile&, int, int) {}

  __device__ __forceinline__ void finish(const float (&sums)[kColumns / 2], const RowTile& tile,
                                         int first_row, int valid_rows) {
    const int column = tile.column_tile * kColumns;
    finish_chunk<0>(sums, column, first_row, valid_rows);
    finish_chunk<32>(sums, column, first_row, valid_rows);
    finish_chunk<64>(sums, column, first_row, valid_rows);
    finish_chunk<96>(sums, column, first_row, valid_rows);
  }

  __device__ __forceinline__ void end() { staged_.end(); }

 private:
  template <int kFirst>
  __device__ __forceinline__ void finish_chunk(const float (&sums)[kColumns / 2], int column,
                                               int first_row, int valid_rows) {
    uint32_t packed[4][4];
    pack_columns<kFirst>(sums, packed);
    staged_.store(packed, arguments_.out, column + 2 * kFirst, first_row, valid_rows);
  }

  const Arguments& arguments_;
  StagedRows staged_;
};

template <bool kTransposeB>
void launch(const ExpertSizes& sizes, const ExpertRows& rows, const void* a, int depth,
            const CUtensorMap& b, void* out, const char* name, void* stream) {
  const int width = sizes.hidden_size;
  launch_row_matmul<RowMatmul<false, kTransposeB, 4, StoreRows>>(
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

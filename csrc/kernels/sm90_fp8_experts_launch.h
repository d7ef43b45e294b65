// What the launchers of the experts' fp8 products share. Tensors of 8 bits are described as bf16
// ones of half the width (sm90_fp8_row_matmul.cuh).
#pragma once

#include "fp8_experts.h"
#include "sm90_experts_launch.h"
#include "sm90_fp8_row_matmul.cuh"

namespace megatron_kanana::sm90 {

// Of weights whose scales are [experts, rows / 128, columns / 128]. `transposed`: the product's
// columns are those of the weights, else they are their rows.
inline Scales scales_of(const float* row_scales, const float* weight_scales, int rows, int columns,
                        bool transposed, int second_part = 1) {
  const int row_blocks = rows / kScaleBlock, column_blocks = columns / kScaleBlock;
  return {.rows = row_scales,
          .weights = weight_scales,
          .expert_stride = int64_t(row_blocks) * column_blocks,
          .column_stride = transposed ? 1 : column_blocks,
          .depth_stride = transposed ? column_blocks : 1,
          .column_blocks = transposed ? column_blocks : row_blocks,
          .blocks = transposed ? row_blocks : column_blocks,
          .second_part = second_part};
}

inline GatheredRows gathered_fp8_rows(const ExpertSizes& sizes, const ExpertRows& rows,
                                      const void* data) {
  GatheredRows gathered = gathered_rows(sizes, rows, data);
  gathered.width /= 2;
  return gathered;
}

// Sets where A lies: rows of `depth` numbers of 8 bits, of tokens that are gathered, or in order.
template <class Matmul>
void set_rows(typename Matmul::Arguments& arguments, const ExpertSizes& sizes,
              const ExpertRows& rows, const void* data, int depth) {
  arguments.groups = row_groups(sizes, rows);
  arguments.depth = depth / 2;
  if constexpr (Matmul::kGather) {
    arguments.gathered = gathered_fp8_rows(sizes, rows, data);
  } else {
    arguments.a = ordered_rows_map(data, sizes.rows, depth / 2, depth / 2, kTileRows);
  }
}

// Without routing there is one expert, which has the tokens' rows as they are.
inline bool are_gathered(const ExpertRows& rows) { return rows.slot_of_row != nullptr; }

template <class Matmul>
void launch_fp8_row_matmul(const typename Matmul::Arguments& arguments, const char* name,
                           void* stream) {
  const auto kernel = fp8_row_matmul_kernel<Matmul>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Matmul::kSharedBytes);
  kernel<<<multiprocessor_count(), Matmul::kThreads, Matmul::kSharedBytes,
           static_cast<cudaStream_t>(stream)>>>(arguments);
  check_cuda(name);
}

}  // namespace megatron_kanana::sm90

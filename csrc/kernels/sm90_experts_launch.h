// What the launchers of the experts' products share.
#pragma once

#include <cuda_runtime.h>

#include "moe.h"
#include "sm90_launch.h"
#include "sm90_row_matmul.cuh"
#include "sm90_staged_rows.cuh"

namespace megatron_kanana::sm90 {

inline RowGroups row_groups(const ExpertSizes& sizes, const ExpertRows& rows) {
  return {rows.offsets, sizes.experts, sizes.rows};
}

inline GatheredRows gathered_rows(const ExpertSizes& sizes, const ExpertRows& rows,
                                  const void* data) {
  return {static_cast<const __nv_bfloat16*>(data), rows.slot_of_row, sizes.experts_of_token,
          sizes.hidden_size};
}

inline const __nv_bfloat16* columns_from(const void* data, int column) {
  return static_cast<const __nv_bfloat16*>(data) + column;
}

template <int kRows = kStoredRows>
OpenRows<kRows> open_rows(const void* data, int rows, int width, int64_t row_stride) {
  const auto* before = static_cast<const __nv_bfloat16*>(data) - kRows * row_stride;
  return {bf16_tensor_map(before, {width, kRows, int64_t(rows) + kRows + 1},
                          {row_stride, row_stride}, {kChunk, kRows, 1}),
          width};
}

// Rows in order, `tile_rows` of them and one chunk of columns a box.
inline CUtensorMap ordered_rows_map(const void* data, int rows, int width, int64_t row_stride,
                                    int tile_rows) {
  return bf16_tensor_map(data, {width, rows, 1}, {row_stride, row_stride * rows},
                         {kChunk, tile_rows, 1});
}

// Weights [experts, rows, columns].
inline CUtensorMap weights_map(const void* data, int experts, int rows, int columns,
                               int tile_rows) {
  return bf16_tensor_map(data, {columns, rows, experts}, {columns, int64_t(columns) * rows},
                         {kChunk, tile_rows, 1});
}

template <class Matmul>
void launch_row_matmul(const typename Matmul::Arguments& arguments, const char* name,
                       void* stream) {
  const auto kernel = row_matmul_kernel<Matmul>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Matmul::kSharedBytes);
  kernel<<<multiprocessor_count(), Matmul::kThreads, Matmul::kSharedBytes,
           static_cast<cudaStream_t>(stream)>>>(arguments);
  check_cuda(name);
}

}  // namespace megatron_kanana::sm90

// Copies between tensors of any strides, in fp32 or bf16, and the rows flash attention works on, a
// tile of one head at a time. Free of torch headers.
#pragma once

#include <cstdint>

#include "flash_attention.h"

namespace megatron_kanana::cpu {

enum class Dtype { kFloat32, kBfloat16 };

// A tensor [sequence, batch, heads, width], strides in elements, the last one 1.
struct StridedTensor {
  void* data;
  Dtype dtype;
  int64_t sequence_stride;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t width;
};

// Tiles of `rows` over all samples and heads: what `tile` counts below.
int64_t count_tiles(const FlashAttentionProblem& problem, const HeadRows& rows);

// Fills a tile, with zeros behind the last position and beside the last column.
void copy_tile_in(const FlashAttentionProblem& problem, const StridedTensor& tensor,
                  const HeadRows& rows, int64_t tile);

// Writes `factor` times the sum over `chunks`, see BackwardBuffers, of a tile.
void copy_tile_out(const FlashAttentionProblem& problem, const HeadRows& rows, int64_t chunks,
                   float factor, const StridedTensor& tensor, int64_t tile);

// Row sums of out * grad_out to delta [batch, heads, padded length], for a tile.
void delta_of_tile(const FlashAttentionProblem& problem, const StridedTensor& out,
                   const HeadRows& grad_out, float* delta, int64_t tile);

}  // namespace megatron_kanana::cpu

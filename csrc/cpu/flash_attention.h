// Flash attention on a CPU: softmax(scale * Q K^T over the visible keys) V and its gradients, tile
// by tile, in fp32, without a matrix of sequence x sequence anywhere. Free of torch headers.
//
// Whoever calls copies the tensors into `HeadRows` first and runs the numbered pieces of work, in
// any order and on any threads; results do not depend on which.
#pragma once

#include <cstdint>

namespace megatron_kanana::cpu {

// Queries and keys are worked on in tiles of this many positions.
constexpr int64_t kTile = 64;

// Widths are padded with zeros to multiples of this.
constexpr int64_t kWidthUnit = 16;

struct FlashAttentionProblem {
  int64_t length;
  int64_t batch;
  int64_t query_heads;
  int64_t key_heads;
  int64_t width;
  int64_t value_width;
  float scale;
  bool causal;
  // Begin of each token's document [batch, length], then its end; null where all is one document.
  const int32_t* documents;

  int64_t padded_length() const { return (length + kTile - 1) / kTile * kTile; }
};

// A tensor of [batch, heads, padded length] rows in fp32, `stride` floats apart.
struct HeadRows {
  float* data;
  int64_t heads;
  int64_t width;   // padded: a multiple of kWidthUnit
  int64_t stride;  // an odd multiple of kWidthUnit: other strides share few sets of the cache

  static HeadRows of_width(int64_t heads, int64_t width) {
    const int64_t units = (width + kWidthUnit - 1) / kWidthUnit;
    return {nullptr, heads, units * kWidthUnit, (units | 1) * kWidthUnit};
  }
  int64_t floats(const FlashAttentionProblem& problem) const {
    return problem.batch * heads * problem.padded_length() * stride;
  }
  // First row of a head, `head` counting over all samples: sample * heads + head.
  float* of_head(const FlashAttentionProblem& problem, int64_t head) const {
    return data + head * problem.padded_length() * stride;
  }
};

struct ForwardBuffers {
  HeadRows query, key, value;
  HeadRows out;
  float* logsumexp;   // [batch, query heads, length]
  float* max_logits;  // [batch, query heads, forward_pieces_of_head]: -inf where nothing is visible
};

struct BackwardBuffers {
  HeadRows query, key, value, grad_out;
  const float* logsumexp;  // [batch, query heads, length]
  const float* delta;      // [batch, query heads, padded length]: row sums of grad_out * out
  // Sums for each chunk of keys: `chunks` times the rows of `query`, each chunk's together. Both
  // these and grad_key still lack the factor `scale`.
  HeadRows grad_query;
  HeadRows grad_key, grad_value;
  int64_t chunks;
};

// The vector instructions in use: 'avx512', 'avx2' or 'baseline'. As torch's own operations do,
// they follow the environment variable ATEN_CPU_CAPABILITY where it asks for less than there is.
const char* instruction_set();

// Work on one query head is cut into this many pieces.
int64_t forward_pieces_of_head(const FlashAttentionProblem& problem);

// Floats that one thread's `scratch` must have.
int64_t forward_scratch(const ForwardBuffers& buffers);
int64_t backward_scratch(const BackwardBuffers& buffers);

// Piece `piece` < batch * query_heads * forward_pieces_of_head.
void forward_piece(const FlashAttentionProblem& problem, const ForwardBuffers& buffers,
                   int64_t piece, float* scratch);

// Into how many chunks of keys the backward pass cuts a head, from the sizes alone.
int64_t backward_chunks(const FlashAttentionProblem& problem);

// Piece `piece` < batch * key_heads * chunks: all gradients of one chunk of keys.
void backward_piece(const FlashAttentionProblem& problem, const BackwardBuffers& buffers,
                    int64_t piece, float* scratch);

}  // namespace megatron_kanana::cpu

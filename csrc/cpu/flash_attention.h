// Flash attention on a CPU: softmax(scale * Q K^T over the visible keys) V and its gradients, tile
// by tile, in fp32, without a matrix of sequence x sequence anywhere. Free of torch headers.
//
// Whoever calls runs the numbered pieces of work, in any order and on any threads, each thread with
// scratch memory of its own; results do not depend on which thread takes what.
#pragma once

#include <cstdint>

#include "strided_rows.h"

namespace megatron_kanana::cpu {

// The backward pass works on tiles of this many queries and of this many keys.
constexpr int64_t kTile = 64;

struct FlashAttentionProblem {
  int64_t length;
  int64_t batch;
  int64_t query_heads;
  int64_t key_heads;
  float scale;
  bool causal;
  // Begin of each token's document [batch, length], then its end; null where all is one document.
  const int32_t* documents;

  int64_t padded_length() const { return (length + kTile - 1) / kTile * kTile; }
};

struct ForwardTensors {
  StridedTensor query, key, value, out;
  // All keys and values as `read_rows` lays them out: [batch, key heads, padded length] rows.
  float* key_rows;
  float* value_rows;
  float* logsumexp;   // [batch, query heads, length]
  float* max_logits;  // [batch, query heads, forward_pieces_of_head]: -inf where nothing is visible
};

struct BackwardTensors {
  StridedTensor query, key, value, grad_out;
  StridedTensor grad_query;
  // `chunks` tensors each, one for each chunk of queries; their sums are the gradients. They are
  // fp32 and so many elements apart unless there is one only.
  StridedTensor grad_key, grad_value;
  int64_t chunks, grad_key_stride, grad_value_stride;
};

// The vector instructions in use: 'avx512', 'avx2' or 'baseline'. As torch's own operations do,
// they follow the environment variable ATEN_CPU_CAPABILITY where it asks for less than there is.
const char* instruction_set();

// Floats that one thread's scratch must have.
int64_t forward_scratch(const ForwardTensors& tensors);
int64_t backward_scratch(const FlashAttentionProblem& problem, const BackwardTensors& tensors);

// Lays out keys and values; `head` < batch * key heads. To be done before the pieces.
void prepare_forward(const FlashAttentionProblem& problem, const ForwardTensors& tensors,
                     int64_t head);

// Work on one query head is cut into this many pieces.
int64_t forward_pieces_of_head(const FlashAttentionProblem& problem);

// Piece `piece` < batch * query heads * forward_pieces_of_head.
void forward_piece(const FlashAttentionProblem& problem, const ForwardTensors& tensors,
                   int64_t piece, float* scratch);

// Into how many chunks the backward pass cuts the queries of a key head, from the sizes alone.
int64_t backward_chunks(const FlashAttentionProblem& problem);

// Piece `piece` < batch * key heads * chunks: the gradients of one chunk of queries, and what they
// give to those of keys and values.
void backward_piece(const FlashAttentionProblem& problem, const BackwardTensors& tensors,
                    int64_t piece, float* scratch);

}  // namespace megatron_kanana::cpu

// Launchers of FlashAttention for Hopper. Free of torch headers; pointers are device memory.
#pragma once

#include <cstdint>

namespace megatron_kanana {

// bf16 [sequence, batch, heads, width]; strides in elements, columns close together.
struct AttentionTensor {
  void* data;
  int64_t sequence_stride;
  int64_t batch_stride;
  int64_t head_stride;
};

struct AttentionProblem {
  int sequence;
  int batch;
  int heads;
  int key_heads;
  int width;        // of queries and keys
  int value_width;  // (width, value_width): (192, 128), (128, 128) or (64, 64)
  float softmax_scale;
  bool causal;
  const int32_t* documents;  // [2, batch, sequence]: first and one past last position, or null
};

// Bytes of device memory the forward needs.
constexpr int64_t kForwardWorkspaceBytes = sizeof(int32_t);

// Writes out, logsumexp [batch, heads, sequence], and raises max_logits [heads] where it is given.
// Throws std::runtime_error where CUDA refuses.
void flash_attention_forward(const AttentionProblem& problem, const AttentionTensor& query,
                             const AttentionTensor& key, const AttentionTensor& value,
                             const AttentionTensor& out, float* logsumexp, float* max_logits,
                             void* workspace, void* stream);

// Bytes of device memory the backward needs: fp32 sums of grad_query, 4 * width bytes a query and
// head, and two numbers more.
int64_t flash_attention_backward_workspace_bytes(const AttentionProblem& problem);

// `deterministic`: sums in a fixed order, so that equal inputs give equal bits.
void flash_attention_backward(const AttentionProblem& problem, const AttentionTensor& grad_out,
                              const AttentionTensor& query, const AttentionTensor& key,
                              const AttentionTensor& value, const AttentionTensor& out,
                              const float* logsumexp, const AttentionTensor& grad_query,
                              const AttentionTensor& grad_key, const AttentionTensor& grad_value,
                              bool deterministic, void* workspace, void* stream);

}  // namespace megatron_kanana

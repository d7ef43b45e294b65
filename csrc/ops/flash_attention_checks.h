// What both implementations of flash attention ask of their arguments, each refused by name.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>

namespace megatron_kanana {

// Sizes of query [length, batch, query_heads, width], key [length, batch, key_heads, width] and
// value [length, batch, key_heads, value_width].
struct FlashAttentionSizes {
  int64_t length;
  int64_t batch;
  int64_t query_heads;
  int64_t key_heads;
  int64_t width;
  int64_t value_width;
};

// Shape, dtype, device and a contiguous last dimension; `peer` is the tensor it must agree with.
inline void check_attention_tensor(const at::Tensor& tensor, const char* name,
                                   at::IntArrayRef shape, const at::Tensor& peer) {
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == peer.scalar_type(), name, " must be ", peer.scalar_type(),
              " as query is, got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == peer.device(), name, " must be on ", peer.device(),
              " as query is, got ", tensor.device());
  TORCH_CHECK(tensor.size(3) == 1 || tensor.stride(3) == 1, name,
              " must be contiguous in its last dimension, got strides ", tensor.strides());
}

// As above for a contiguous tensor of a dtype of its own.
inline void check_attention_buffer(const at::Tensor& tensor, const char* name,
                                   at::IntArrayRef shape, at::ScalarType dtype,
                                   const at::Tensor& query) {
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.device() == query.device(), name, " must be on ", query.device(),
              " as query is, got ", tensor.device());
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

// Checks what the forward and the backward pass have in common.
inline FlashAttentionSizes check_attention_inputs(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value, double softmax_scale,
                                                  const std::optional<at::Tensor>& documents) {
  TORCH_CHECK(query.dim() == 4, "query must have shape [sequence, batch, heads, width], got ",
              query.sizes());
  TORCH_CHECK(key.dim() == 4, "key must have shape [sequence, batch, heads, width], got ",
              key.sizes());
  TORCH_CHECK(value.dim() == 4, "value must have shape [sequence, batch, heads, width], got ",
              value.sizes());
  const FlashAttentionSizes sizes = {query.size(0), query.size(1), query.size(2),
                                     key.size(2),   query.size(3), value.size(3)};
  TORCH_CHECK(query.numel() > 0, "query must not be empty, got shape ", query.sizes());
  TORCH_CHECK(value.numel() > 0, "value must not be empty, got shape ", value.sizes());
  TORCH_CHECK(sizes.key_heads > 0 && sizes.query_heads % sizes.key_heads == 0,
              "query must have a multiple of key's heads, got ", sizes.query_heads, " and ",
              sizes.key_heads);
  TORCH_CHECK(query.scalar_type() == at::kFloat || query.scalar_type() == at::kBFloat16,
              "query must be float32 or bfloat16, got ", query.scalar_type());
  const int64_t length = sizes.length, batch = sizes.batch, key_heads = sizes.key_heads;
  check_attention_tensor(query, "query", query.sizes(), query);
  check_attention_tensor(key, "key", {length, batch, key_heads, sizes.width}, query);
  check_attention_tensor(value, "value", {length, batch, key_heads, sizes.value_width}, query);
  TORCH_CHECK(std::isfinite(softmax_scale) && softmax_scale > 0,
              "softmax_scale must be positive and finite, got ", softmax_scale);
  if (documents.has_value()) {
    check_attention_buffer(*documents, "documents", {2, batch, length}, at::kInt, query);
  }
  return sizes;
}

inline FlashAttentionSizes check_attention_forward(const at::Tensor& query, const at::Tensor& key,
                                                   const at::Tensor& value, double softmax_scale,
                                                   const std::optional<at::Tensor>& documents,
                                                   const std::optional<at::Tensor>& max_logits) {
  const FlashAttentionSizes sizes =
      check_attention_inputs(query, key, value, softmax_scale, documents);
  if (max_logits.has_value()) {
    check_attention_buffer(*max_logits, "max_logits", {sizes.query_heads}, at::kFloat, query);
  }
  return sizes;
}

inline FlashAttentionSizes check_attention_backward(const at::Tensor& grad_out,
                                                    const at::Tensor& query, const at::Tensor& key,
                                                    const at::Tensor& value, const at::Tensor& out,
                                                    const at::Tensor& logsumexp,
                                                    double softmax_scale,
                                                    const std::optional<at::Tensor>& documents) {
  const FlashAttentionSizes sizes =
      check_attention_inputs(query, key, value, softmax_scale, documents);
  const std::array<int64_t, 4> out_shape = {sizes.length, sizes.batch, sizes.query_heads,
                                            sizes.value_width};
  check_attention_tensor(grad_out, "grad_out", out_shape, query);
  check_attention_tensor(out, "out", out_shape, query);
  check_attention_buffer(logsumexp, "logsumexp", {sizes.batch, sizes.query_heads, sizes.length},
                         at::kFloat, query);
  return sizes;
}

}  // namespace megatron_kanana

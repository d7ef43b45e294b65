// What all implementations of cross-entropy's rows ask of their arguments, each refused by name.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

namespace megatron_kanana {

inline void check_of_rows(const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                          at::ScalarType dtype, const at::Tensor& logits) {
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.device() == logits.device(), name, " must be on ", logits.device(),
              " as logits is, got ", tensor.device());
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

inline void check_logits(const at::Tensor& logits, const at::Tensor& labels) {
  TORCH_CHECK(logits.dim() == 2, "logits must have shape [tokens, words], got ", logits.sizes());
  TORCH_CHECK(logits.size(1) > 0, "logits must have words, got shape ", logits.sizes());
  TORCH_CHECK(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16,
              "logits must be float32 or bfloat16, got ", logits.scalar_type());
  TORCH_CHECK(logits.stride(1) == 1 && logits.stride(0) >= logits.size(1),
              "rows of logits must be contiguous and apart, got strides ", logits.strides());
  check_of_rows(labels, "labels", {logits.size(0)}, at::kLong, logits);
}

inline void check_gradient(const at::Tensor& logits, const at::Tensor& labels,
                           const at::Tensor& statistics, const at::Tensor& weights) {
  check_logits(logits, labels);
  check_of_rows(statistics, "statistics", {3, logits.size(0)}, at::kFloat, logits);
  check_of_rows(weights, "weights", {logits.size(0)}, at::kFloat, logits);
}

}  // namespace megatron_kanana

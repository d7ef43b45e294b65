// Flash attention on Hopper GPUs by csrc/kernels. Needs no CUDA headers.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>

#include "../kernels/flash_attention.h"
#include "cuda_stream.h"
#include "flash_attention_checks.h"

namespace megatron_kanana {
namespace {

// Sizes of 1 may have any stride, which the copy engine would refuse.
AttentionTensor attention_tensor(const at::Tensor& tensor, const char* name) {
  const auto stride = [&](int64_t dimension) {
    const int64_t elements = tensor.size(dimension) == 1 ? 8 : tensor.stride(dimension);
    TORCH_CHECK(elements > 0 && elements % 8 == 0, name,
                " must have strides that are positive multiples of 8, got ", tensor.strides());
    return elements;
  };
  TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, name,
              " must begin at a multiple of 16 bytes");
  return {tensor.data_ptr(), stride(0), stride(1), stride(2)};
}

AttentionProblem problem_of(const at::Tensor& query, const FlashAttentionSizes& sizes,
                            double softmax_scale, bool causal,
                            const std::optional<at::Tensor>& documents) {
  const bool has_kernel = (sizes.width == 192 && sizes.value_width == 128) ||
                          (sizes.width == 128 && sizes.value_width == 128) ||
                          (sizes.width == 64 && sizes.value_width == 64);
  TORCH_CHECK(query.scalar_type() == at::kBFloat16, "query must be bfloat16 on CUDA, got ",
              query.scalar_type());
  TORCH_CHECK(has_kernel,
              "query and value must have widths of 192 and 128, 128 and 128 or 64 and "
              "64 on CUDA, got ",
              sizes.width, " and ", sizes.value_width);
  TORCH_CHECK(sizes.length <= (1 << 30), "query must be shorter than 2^30, got ", sizes.length);
  return {static_cast<int>(sizes.length),
          static_cast<int>(sizes.batch),
          static_cast<int>(sizes.query_heads),
          static_cast<int>(sizes.key_heads),
          static_cast<int>(sizes.width),
          static_cast<int>(sizes.value_width),
          static_cast<float>(softmax_scale),
          causal,
          documents.has_value() ? documents->const_data_ptr<int32_t>() : nullptr};
}

at::Tensor workspace_of(const at::Tensor& query, int64_t bytes) {
  return at::empty({bytes}, query.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor> flash_attention_forward_cuda(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double softmax_scale,
    bool causal, const std::optional<at::Tensor>& documents,
    const std::optional<at::Tensor>& max_logits) {
  const FlashAttentionSizes sizes =
      check_attention_forward(query, key, value, softmax_scale, documents, max_logits);
  const auto problem = problem_of(query, sizes, softmax_scale, causal, documents);
  const c10::DeviceGuard guard(query.device());
  at::Tensor out =
      at::empty({sizes.length, sizes.batch, sizes.query_heads, sizes.value_width}, query.options());
  at::Tensor logsumexp =
      at::empty({sizes.batch, sizes.query_heads, sizes.length}, query.options().dtype(at::kFloat));
  at::Tensor workspace = workspace_of(query, kForwardWorkspaceBytes);
  flash_attention_forward(problem, attention_tensor(query, "query"), attention_tensor(key, "key"),
                          attention_tensor(value, "value"), attention_tensor(out, "out"),
                          logsumexp.mutable_data_ptr<float>(),
                          max_logits.has_value() ? max_logits->mutable_data_ptr<float>() : nullptr,
                          workspace.mutable_data_ptr(), current_stream(query));
  return {out, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_attention_backward_cuda(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& logsumexp,
    double softmax_scale, bool causal, const std::optional<at::Tensor>& documents,
    bool deterministic) {
  const FlashAttentionSizes sizes = check_attention_backward(grad_out, query, key, value, out,
                                                             logsumexp, softmax_scale, documents);
  const auto problem = problem_of(query, sizes, softmax_scale, causal, documents);
  const c10::DeviceGuard guard(query.device());
  at::Tensor grad_query = at::empty(query.sizes(), query.options());
  at::Tensor grad_key = at::empty(key.sizes(), key.options());
  at::Tensor grad_value = at::empty(value.sizes(), value.options());
  at::Tensor workspace = workspace_of(query, flash_attention_backward_workspace_bytes(problem));
  flash_attention_backward(
      problem, attention_tensor(grad_out, "grad_out"), attention_tensor(query, "query"),
      attention_tensor(key, "key"), attention_tensor(value, "value"), attention_tensor(out, "out"),
      logsumexp.const_data_ptr<float>(), attention_tensor(grad_query, "grad_query"),
      attention_tensor(grad_key, "grad_key"), attention_tensor(grad_value, "grad_value"),
      deterministic, workspace.mutable_data_ptr(), current_stream(query));
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_kanana, CUDA, library) {
  library.impl("flash_attention_forward", flash_attention_forward_cuda);
  library.impl("flash_attention_backward", flash_attention_backward_cuda);
}

}  // namespace megatron_kanana

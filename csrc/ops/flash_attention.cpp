// torch.library schema of flash attention, and its implementation on a CPU by csrc/cpu.
#include "../cpu/flash_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "flash_attention_checks.h"
#include "pieces.h"

namespace megatron_kanana {
namespace {

using cpu::StridedTensor;

// Positions outside the sequence would be read as keys.
void check_documents(const at::Tensor& documents, const FlashAttentionSizes& sizes) {
  const int32_t* const begins = documents.const_data_ptr<int32_t>();
  const int32_t* const ends = begins + sizes.batch * sizes.length;
  for (int64_t token = 0; token < sizes.batch * sizes.length; ++token) {
    const int64_t position = token % sizes.length, begin = begins[token], end = ends[token];
    const bool padding = begin == position && end == position;
    const bool inside = 0 <= begin && begin <= position && position < end && end <= sizes.length;
    const bool goes_on = inside && position > begin;
    TORCH_CHECK(
        padding || (inside && (!goes_on || (begins[token - 1] == begin && ends[token - 1] == end))),
        "documents must give each token the range of positions of its document, or an empty "
        "range at its own position for padding; sample ",
        token / sizes.length, ", position ", position, " has [", begin, ", ", end, ")");
    const bool previous_ends = position == 0 || padding || goes_on || ends[token - 1] <= position;
    TORCH_CHECK(previous_ends, "documents must not overlap; sample ", token / sizes.length,
                ", position ", position, " begins a document inside another");
  }
}

cpu::FlashAttentionProblem problem_of(const FlashAttentionSizes& sizes, double softmax_scale,
                                      bool causal, const std::optional<at::Tensor>& documents) {
  if (documents.has_value()) check_documents(*documents, sizes);
  return {sizes.length,
          sizes.batch,
          sizes.query_heads,
          sizes.key_heads,
          static_cast<float>(softmax_scale),
          causal,
          documents.has_value() ? documents->const_data_ptr<int32_t>() : nullptr};
}

StridedTensor strided(const at::Tensor& tensor) {
  return {tensor.data_ptr(),
          tensor.scalar_type() == at::kFloat ? cpu::Dtype::kFloat32 : cpu::Dtype::kBfloat16,
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.size(3)};
}

// max_logits[n] = max(max_logits[n], maxima[:, n, :]), NaN above all as in torch.
void update_max_logits(const at::Tensor& maxima, const at::Tensor& max_logits) {
  const int64_t heads = maxima.size(1), pieces = maxima.size(2);
  const float* const data = maxima.const_data_ptr<float>();
  float* const result = max_logits.mutable_data_ptr<float>();
  for (int64_t i = 0; i < maxima.numel(); ++i) {
    float& largest = result[i / pieces % heads];
    if (data[i] > largest || std::isnan(data[i])) largest = data[i];
  }
}

std::tuple<at::Tensor, at::Tensor> flash_attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double softmax_scale,
    bool causal, const std::optional<at::Tensor>& documents,
    const std::optional<at::Tensor>& max_logits) {
  const FlashAttentionSizes sizes =
      check_attention_forward(query, key, value, softmax_scale, documents, max_logits);
  const auto problem = problem_of(sizes, softmax_scale, causal, documents);
  at::Tensor out =
      at::empty({sizes.length, sizes.batch, sizes.query_heads, sizes.value_width}, query.options());
  at::Tensor logsumexp = at::empty({sizes.batch, sizes.query_heads, sizes.length}, at::kFloat);
  at::Tensor maxima =
      at::empty({sizes.batch, sizes.query_heads, cpu::forward_pieces_of_head(problem)}, at::kFloat);
  const StridedTensor keys = strided(key), values = strided(value);
  const int64_t key_heads = sizes.batch * sizes.key_heads;
  const int64_t rows = key_heads * problem.padded_length();
  at::Tensor key_rows = at::empty({rows, keys.row_stride()}, at::kFloat);
  at::Tensor value_rows = at::empty({rows, values.row_stride()}, at::kFloat);
  const cpu::ForwardTensors tensors = {strided(query),
                                       keys,
                                       values,
                                       strided(out),
                                       key_rows.mutable_data_ptr<float>(),
                                       value_rows.mutable_data_ptr<float>(),
                                       logsumexp.mutable_data_ptr<float>(),
                                       maxima.mutable_data_ptr<float>()};
  at::parallel_for(0, key_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) cpu::prepare_forward(problem, tensors, head);
  });
  for_each_piece(maxima.numel(), cpu::forward_scratch(tensors), [&](int64_t piece, float* scratch) {
    cpu::forward_piece(problem, tensors, piece, scratch);
  });
  if (max_logits.has_value()) update_max_logits(maxima, *max_logits);
  return {out, logsumexp};
}

// The sum of the first dimension's tensors, in the peer's dtype.
at::Tensor sum_of_chunks(const at::Tensor& chunks, const at::Tensor& peer) {
  at::Tensor sum = chunks[0];
  for (int64_t chunk = 1; chunk < chunks.size(0); ++chunk) sum.add_(chunks[chunk]);
  if (chunks.size(0) == 1) return sum;
  return sum.to(peer.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

// Always deterministic. Softmax is computed again, whole rows at once, and with it what the output
// and the logarithms would tell: they are not read.
std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& logsumexp,
    double softmax_scale, bool causal, const std::optional<at::Tensor>& documents, bool) {
  const FlashAttentionSizes sizes = check_attention_backward(grad_out, query, key, value, out,
                                                             logsumexp, softmax_scale, documents);
  const auto problem = problem_of(sizes, softmax_scale, causal, documents);
  const int64_t chunks = cpu::backward_chunks(problem);
  const at::TensorOptions options =
      chunks == 1 ? query.options() : query.options().dtype(at::kFloat);
  at::Tensor grad_query = at::empty(query.sizes(), query.options());
  at::Tensor grad_keys =
      at::empty({chunks, sizes.length, sizes.batch, sizes.key_heads, sizes.width}, options);
  at::Tensor grad_values =
      at::empty({chunks, sizes.length, sizes.batch, sizes.key_heads, sizes.value_width}, options);
  const cpu::BackwardTensors tensors = {
      strided(query),      strided(key),          strided(value),          strided(grad_out),
      strided(grad_query), strided(grad_keys[0]), strided(grad_values[0]), chunks,
      grad_keys.stride(0), grad_values.stride(0)};
  for_each_piece(sizes.batch * sizes.key_heads * chunks, cpu::backward_scratch(problem, tensors),
                 [&](int64_t piece, float* scratch) {
                   cpu::backward_piece(problem, tensors, piece, scratch);
                 });
  return {grad_query, sum_of_chunks(grad_keys, query), sum_of_chunks(grad_values, query)};
}

}  // namespace

TORCH_LIBRARY(megatron_kanana, library) {
  library.def(
      "flash_attention_forward(Tensor query, Tensor key, Tensor value, float softmax_scale, "
      "bool causal, Tensor? documents, Tensor(a!)? max_logits) -> (Tensor out, Tensor logsumexp)");
  library.def(
      "flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor logsumexp, float softmax_scale, bool causal, Tensor? documents, "
      "bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  library.def("cpu_instruction_set() -> str",
              []() -> std::string { return cpu::instruction_set(); });
}

TORCH_LIBRARY_IMPL(megatron_kanana, CPU, library) {
  library.impl("flash_attention_forward", flash_attention_forward);
  library.impl("flash_attention_backward", flash_attention_backward);
}

}  // namespace megatron_kanana

// torch.library schema of flash attention, and its implementation on a CPU by csrc/cpu.
#include "../cpu/flash_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <tuple>

#include "../cpu/head_rows.h"
#include "flash_attention_checks.h"

namespace megatron_kanana {
namespace {

using cpu::HeadRows;
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
          sizes.width,
          sizes.value_width,
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

// Rows in memory of their own.
struct OwnedRows : HeadRows {
  at::Tensor memory;

  OwnedRows(const cpu::FlashAttentionProblem& problem, int64_t heads, int64_t width,
            int64_t copies = 1)
      : HeadRows(HeadRows::of_width(heads, width)),
        memory(at::empty({copies * floats(problem)}, at::kFloat)) {
    data = memory.mutable_data_ptr<float>();
  }

  // Holding the same as `tensor`.
  OwnedRows(const cpu::FlashAttentionProblem& problem, const at::Tensor& tensor)
      : OwnedRows(problem, tensor.size(2), tensor.size(3)) {
    const StridedTensor source = strided(tensor);
    at::parallel_for(0, cpu::count_tiles(problem, *this), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        cpu::copy_tile_in(problem, source, *this, tile);
      }
    });
  }

  // A new contiguous tensor of `factor` times the sum over `copies`.
  at::Tensor to_tensor(const cpu::FlashAttentionProblem& problem, int64_t tensor_width,
                       at::ScalarType dtype, float factor = 1.0f, int64_t copies = 1) const {
    at::Tensor tensor = at::empty({problem.length, problem.batch, heads, tensor_width}, dtype);
    const StridedTensor target = strided(tensor);
    at::parallel_for(0, cpu::count_tiles(problem, *this), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        cpu::copy_tile_out(problem, *this, copies, factor, target, tile);
      }
    });
    return tensor;
  }
};

// Calls work(piece, scratch) for every piece, each thread taking the next one when it is done with
// its last: pieces differ in work.
template <class Work>
void for_each_piece(int64_t pieces, int64_t scratch_floats, const Work& work) {
  const int64_t threads = std::min<int64_t>(pieces, at::get_num_threads());
  at::Tensor scratch = at::empty({threads, scratch_floats}, at::kFloat);
  float* const scratch_data = scratch.mutable_data_ptr<float>();
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t piece = next++; piece < pieces; piece = next++) {
      work(piece, scratch_data + begin * scratch_floats);
    }
  });
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
  const OwnedRows queries(problem, query), keys(problem, key), values(problem, value);
  const OwnedRows out(problem, sizes.query_heads, sizes.value_width);
  const int64_t pieces_of_head = cpu::forward_pieces_of_head(problem);
  at::Tensor logsumexp = at::empty({sizes.batch, sizes.query_heads, sizes.length}, at::kFloat);
  at::Tensor maxima = at::empty({sizes.batch, sizes.query_heads, pieces_of_head}, at::kFloat);
  const cpu::ForwardBuffers buffers = {queries,
                                       keys,
                                       values,
                                       out,
                                       logsumexp.mutable_data_ptr<float>(),
                                       maxima.mutable_data_ptr<float>()};
  for_each_piece(maxima.numel(), cpu::forward_scratch(buffers), [&](int64_t piece, float* scratch) {
    cpu::forward_piece(problem, buffers, piece, scratch);
  });
  if (max_logits.has_value()) update_max_logits(maxima, *max_logits);
  return {out.to_tensor(problem, sizes.value_width, value.scalar_type()), logsumexp};
}

at::Tensor delta_of(const cpu::FlashAttentionProblem& problem, const at::Tensor& out,
                    const HeadRows& grad_out) {
  at::Tensor delta =
      at::empty({problem.batch, problem.query_heads, problem.padded_length()}, at::kFloat);
  float* const data = delta.mutable_data_ptr<float>();
  const StridedTensor source = strided(out);
  at::parallel_for(0, cpu::count_tiles(problem, grad_out), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      cpu::delta_of_tile(problem, source, grad_out, data, tile);
    }
  });
  return delta;
}

// Always deterministic.
std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& logsumexp,
    double softmax_scale, bool causal, const std::optional<at::Tensor>& documents, bool) {
  const FlashAttentionSizes sizes = check_attention_backward(grad_out, query, key, value, out,
                                                             logsumexp, softmax_scale, documents);
  const auto problem = problem_of(sizes, softmax_scale, causal, documents);
  const OwnedRows queries(problem, query), keys(problem, key), values(problem, value);
  const OwnedRows grads(problem, grad_out);
  const at::Tensor delta = delta_of(problem, out, grads);
  const int64_t chunks = cpu::backward_chunks(problem);
  const OwnedRows grad_query(problem, sizes.query_heads, sizes.width, chunks);
  const OwnedRows grad_key(problem, sizes.key_heads, sizes.width);
  const OwnedRows grad_value(problem, sizes.key_heads, sizes.value_width);
  const cpu::BackwardBuffers buffers = {queries,
                                        keys,
                                        values,
                                        grads,
                                        logsumexp.const_data_ptr<float>(),
                                        delta.const_data_ptr<float>(),
                                        grad_query,
                                        grad_key,
                                        grad_value,
                                        chunks};
  for_each_piece(sizes.batch * sizes.key_heads * chunks, cpu::backward_scratch(buffers),
                 [&](int64_t piece, float* scratch) {
                   cpu::backward_piece(problem, buffers, piece, scratch);
                 });
  const at::ScalarType dtype = query.scalar_type();
  return {grad_query.to_tensor(problem, sizes.width, dtype, problem.scale, chunks),
          grad_key.to_tensor(problem, sizes.width, dtype, problem.scale),
          grad_value.to_tensor(problem, sizes.value_width, dtype)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_kanana, library) {
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

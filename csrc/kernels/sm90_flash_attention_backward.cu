// Launches the backward: what each query needs, the kernel of the products, dQ to bf16.
#include <cuda_runtime.h>

#include <stdexcept>

#include "flash_attention_backward_edges.cuh"
#include "sm90_attention_launch.h"
#include "sm90_flash_attention_backward.cuh"

namespace megatron_kanana {
namespace {

using namespace sm90;

constexpr int kQueries = 64;  // of a tile

// Parts of the workspace, in floats (or numbers of as many bytes); the first two begin at zero.
struct Workspace {
  int64_t grad_query, finished, statistics, total;

  explicit Workspace(const AttentionProblem& p) {
    const int64_t tiles = int64_t(p.batch) * p.heads * ((p.sequence + kQueries - 1) / kQueries);
    grad_query = tiles * kQueries * p.width;
    finished = (2 * tiles + 1 + 3) / 4 * 4;  // copies start at multiples of 16 bytes
    statistics = tiles * kQueries;
    total = grad_query + finished + 2 * statistics;
  }
};

template <int kWidth, int kValueWidth>
void launch(const AttentionProblem& p, const AttentionTensor& grad_out,
            const AttentionTensor& query, const AttentionTensor& key, const AttentionTensor& value,
            const AttentionTensor& out, const float* logsumexp, const AttentionTensor& grad_query,
            const AttentionTensor& grad_key, const AttentionTensor& grad_value, bool deterministic,
            float* workspace, cudaStream_t stream) {
  using Tile = BackwardTile<kWidth, kValueWidth>;
  static_assert(Tile::kQueries == kQueries);
  const Workspace parts(p);
  const int tiles = (p.sequence + kQueries - 1) / kQueries;
  const int64_t rows = parts.statistics;
  const int key_tiles = (p.sequence + Tile::kKeys - 1) / Tile::kKeys;
  const int key_heads = p.batch * p.key_heads;  // of all samples
  const int64_t blocks = int64_t(key_heads) * key_tiles;
  // In a fixed order blocks wait for those before them, so a head's blocks are best begun together.
  HeadGroups order = head_groups(key_tiles, key_heads, multiprocessor_count());
  if (deterministic) order = {key_tiles, key_heads, 1, key_heads};
  if (rows * 16 / kEdgeThreads > INT32_MAX) {
    throw std::runtime_error("attention has too many tiles");
  }
  auto* finished = reinterpret_cast<int32_t*>(workspace + parts.grad_query);
  float* logsumexp_log2 = workspace + parts.grad_query + parts.finished;
  float* out_dot_grad = logsumexp_log2 + parts.statistics;
  const auto map = [&](const AttentionTensor& tensor, int heads, int width, int box_rows,
                       int columns) {
    return attention_tensor_map(tensor, p.sequence, p.batch, heads, width, box_rows, columns);
  };
  BackwardArguments arguments{
      .query = map(query, p.heads, kWidth, kQueries, 64),
      .key = map(key, p.key_heads, kWidth, Tile::kKeys, 32),
      .value = map(value, p.key_heads, kValueWidth, Tile::kKeys, 64),
      .grad_out = map(grad_out, p.heads, kValueWidth, kQueries, 64),
      .grad_key = map(grad_key, p.key_heads, kWidth, 64, 64),
      .grad_value = map(grad_value, p.key_heads, kValueWidth, 64, 64),
      .logsumexp_log2 = logsumexp_log2,
      .out_dot_grad = out_dot_grad,
      .grad_query = workspace,
      .finished = deterministic ? finished : nullptr,
      .next_block = deterministic ? finished + 2 * rows / kQueries : nullptr,
      .documents = p.documents,
      .sequence = p.sequence,
      .batch = p.batch,
      .heads = p.heads,
      .queries_of_a_key = p.heads / p.key_heads,
      .order = order,
      .softmax_scale = p.softmax_scale,
      .causal = p.causal,
  };

  cudaMemsetAsync(workspace, 0, (parts.grad_query + parts.finished) * sizeof(float), stream);
  constexpr int kRowsOfABlock = kEdgeThreads / (kValueWidth / 8);
  backward_prepare_kernel<kValueWidth>
      <<<static_cast<int>((rows + kRowsOfABlock - 1) / kRowsOfABlock), kEdgeThreads, 0, stream>>>(
          out, grad_out, logsumexp, out_dot_grad, logsumexp_log2, p.sequence, tiles * kQueries,
          p.heads, rows);
  check_cuda("flash_attention_backward, prepare");
  const auto kernel = backward_kernel<Tile>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  kernel<<<static_cast<int>(blocks), kBackwardThreads, Tile::kSharedBytes, stream>>>(arguments);
  check_cuda("flash_attention_backward");
  backward_finish_kernel<kWidth><<<static_cast<int>(rows / kQueries), kEdgeThreads, 0, stream>>>(
      workspace, grad_query, p.sequence, p.heads, p.softmax_scale);
  check_cuda("flash_attention_backward, finish");
}

}  // namespace

int64_t flash_attention_backward_workspace_bytes(const AttentionProblem& problem) {
  return Workspace(problem).total * sizeof(float);
}

void flash_attention_backward(const AttentionProblem& problem, const AttentionTensor& grad_out,
                              const AttentionTensor& query, const AttentionTensor& key,
                              const AttentionTensor& value, const AttentionTensor& out,
                              const float* logsumexp, const AttentionTensor& grad_query,
                              const AttentionTensor& grad_key, const AttentionTensor& grad_value,
                              bool deterministic, void* workspace, void* stream) {
  enter_device();
  const auto run = [&](auto launch_widths) {
    launch_widths(problem, grad_out, query, key, value, out, logsumexp, grad_query, grad_key,
                  grad_value, deterministic, static_cast<float*>(workspace),
                  static_cast<cudaStream_t>(stream));
  };
  if (problem.width == 192 && problem.value_width == 128) return run(launch<192, 128>);
  if (problem.width == 128 && problem.value_width == 128) return run(launch<128, 128>);
  if (problem.width == 64 && problem.value_width == 64) return run(launch<64, 64>);
  throw std::runtime_error("FlashAttention has no kernel for these widths");
}

}  // namespace megatron_kanana

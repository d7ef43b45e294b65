// Launches the forward: one persistent block a multiprocessor.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "sm90_attention_launch.h"
#include "sm90_flash_attention_forward.cuh"

namespace megatron_kanana {
namespace {

using namespace sm90;

template <int kWidth, int kValueWidth>
void launch(const AttentionProblem& p, const AttentionTensor& query, const AttentionTensor& key,
            const AttentionTensor& value, const AttentionTensor& out, float* logsumexp,
            float* max_logits, int32_t* tile_counter, cudaStream_t stream) {
  using Tile = ForwardTile<kWidth, kValueWidth>;
  constexpr int kHalf = 64;
  const int rows = (p.sequence + Tile::kQueries - 1) / Tile::kQueries;
  const int64_t tiles = int64_t(p.batch) * p.heads * rows;
  const int multiprocessors = multiprocessor_count();
  ForwardArguments arguments{
      .query = attention_tensor_map(query, p.sequence, p.batch, p.heads, kWidth, kHalf, 64),
      .key = attention_tensor_map(key, p.sequence, p.batch, p.key_heads, kWidth, Tile::kKeys, 64),
      .value = attention_tensor_map(value, p.sequence, p.batch, p.key_heads, kValueWidth,
                                    Tile::kKeys, 64),
      .out = attention_tensor_map(out, p.sequence, p.batch, p.heads, kValueWidth, kHalf, 64),
      .logsumexp = logsumexp,
      .max_logits = max_logits,
      .tile_counter = tile_counter,
      .documents = p.documents,
      .sequence = p.sequence,
      .batch = p.batch,
      .heads = p.heads,
      .queries_of_a_key = p.heads / p.key_heads,
      .order = head_groups(rows, p.batch * p.heads, multiprocessors),
      .softmax_scale = p.softmax_scale,
      .causal = p.causal,
  };
  if (tiles > INT32_MAX / 2) throw std::runtime_error("attention has too many tiles");
  cudaMemsetAsync(tile_counter, 0, sizeof(int32_t), stream);
  const auto kernel = forward_kernel<Tile>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  kernel<<<static_cast<int>(std::min<int64_t>(multiprocessors, tiles)), Tile::kThreads,
           Tile::kSharedBytes, stream>>>(arguments);
  check_cuda("flash_attention_forward");
}

}  // namespace

void flash_attention_forward(const AttentionProblem& problem, const AttentionTensor& query,
                             const AttentionTensor& key, const AttentionTensor& value,
                             const AttentionTensor& out, float* logsumexp, float* max_logits,
                             void* workspace, void* stream) {
  enter_device();
  const auto run = [&](auto launch_widths) {
    launch_widths(problem, query, key, value, out, logsumexp, max_logits,
                  static_cast<int32_t*>(workspace), static_cast<cudaStream_t>(stream));
  };
  if (problem.width == 192 && problem.value_width == 128) return run(launch<192, 128>);
  if (problem.width == 128 && problem.value_width == 128) return run(launch<128, 128>);
  if (problem.width == 64 && problem.value_width == 64) return run(launch<64, 64>);
  throw std::runtime_error("FlashAttention has no kernel for these widths");
}

}  // namespace megatron_kanana

#include "flash_attention.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "flash_attention_target.h"

namespace megatron_kanana::cpu {
namespace {

// A key head's backward pass is cut where there are fewer heads than this, each cut at most so
// often: every chunk has gradients of all keys and values to itself.
constexpr int64_t kWantedPieces = 8;
constexpr int64_t kMostChunks = 4;
constexpr int64_t kLeastChunkQueries = 512;

const FlashAttentionTarget& choose_target() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const char* const capability = std::getenv("ATEN_CPU_CAPABILITY");
  const bool no_avx2 = capability != nullptr && std::strcmp(capability, "default") == 0;
  const bool no_avx512 = no_avx2 || (capability != nullptr && std::strcmp(capability, "avx2") == 0);
  if (!no_avx512 && __builtin_cpu_supports("avx512f")) return kAvx512;
  if (!no_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

const FlashAttentionTarget& target() {
  static const FlashAttentionTarget& chosen = choose_target();
  return chosen;
}

}  // namespace

const char* instruction_set() { return target().name; }

int64_t forward_scratch(const ForwardTensors& tensors) { return target().forward_scratch(tensors); }

int64_t backward_scratch(const FlashAttentionProblem& problem, const BackwardTensors& tensors) {
  return target().backward_scratch(problem, tensors);
}

void prepare_forward(const FlashAttentionProblem& problem, const ForwardTensors& tensors,
                     int64_t head) {
  const int64_t rows = problem.padded_length();
  const HeadPositions positions = {head / problem.key_heads, head % problem.key_heads, 0,
                                   problem.length};
  read_rows(tensors.key, positions, rows,
            tensors.key_rows + head * rows * tensors.key.row_stride());
  read_rows(tensors.value, positions, rows,
            tensors.value_rows + head * rows * tensors.value.row_stride());
}

int64_t forward_pieces_of_head(const FlashAttentionProblem& problem) {
  return problem.padded_length() / target().column;
}

void forward_piece(const FlashAttentionProblem& problem, const ForwardTensors& tensors,
                   int64_t piece, float* scratch) {
  target().forward_piece(problem, tensors, piece, scratch);
}

int64_t backward_chunks(const FlashAttentionProblem& problem) {
  const int64_t heads = problem.batch * problem.key_heads;
  const int64_t queries = problem.query_heads / problem.key_heads * problem.length;
  const int64_t wanted = std::min((kWantedPieces + heads - 1) / heads, kMostChunks);
  return std::clamp<int64_t>(queries / kLeastChunkQueries, 1, wanted);
}

void backward_piece(const FlashAttentionProblem& problem, const BackwardTensors& tensors,
                    int64_t piece, float* scratch) {
  target().backward_piece(problem, tensors, piece, scratch);
}

}  // namespace megatron_kanana::cpu

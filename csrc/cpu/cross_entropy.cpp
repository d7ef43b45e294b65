#include "cross_entropy.h"

#include <string_view>

#include "cross_entropy_target.h"
#include "flash_attention.h"

namespace megatron_kanana::cpu {
namespace {

const CrossEntropyTarget& choose_target() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const std::string_view instructions = instruction_set();
  if (instructions == "avx512") return kCrossEntropyAvx512;
  if (instructions == "avx2") return kCrossEntropyAvx2;
#endif
  return kCrossEntropyBaseline;
}

const CrossEntropyTarget& target() {
  static const CrossEntropyTarget& chosen = choose_target();
  return chosen;
}

}  // namespace

void cross_entropy_statistics(const CrossEntropyProblem& problem, float* statistics, int64_t row) {
  target().statistics(problem, statistics, row);
}

void cross_entropy_gradient(const CrossEntropyProblem& problem, const float* statistics,
                            const float* weights, int64_t row) {
  target().gradient(problem, statistics, weights, row);
}

}  // namespace megatron_kanana::cpu

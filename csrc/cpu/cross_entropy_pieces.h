// Rows of cross-entropy. Included once for each target, see vectors.h.
#pragma once

#include "cross_entropy.h"
#include "elements.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

constexpr int64_t kBlockWords = 1024;  // a multiple of vectors, which stays in the first cache
// Below any logit, and finite: differences with it are no NaN.
constexpr float kLowestLogit = -1e30f;

// Words of the block that begins at `first`, widened, and behind them up to a whole vector words
// that add nothing; how many there are with them.
inline int64_t read_block(const CrossEntropyProblem& problem, int64_t row, int64_t first,
                          float* block) {
  const int64_t left = problem.words - first;
  const int64_t count = left < kBlockWords ? left : kBlockWords;
  const int64_t padded = (count + kVector - 1) / kVector * kVector;
  read_row(problem.logits, problem.dtype, row * problem.stride + first, count, count, block);
  for (int64_t i = count; i < padded; ++i) block[i] = -__builtin_inff();
  return padded;
}

inline float logit_of_label(const CrossEntropyProblem& problem, int64_t row, int64_t label) {
  float logit;
  read_row(problem.logits, problem.dtype, row * problem.stride + label, 1, 1, &logit);
  return logit;
}

MEGATRON_KANANA_INLINE float largest_of(Floats values) {
  float largest = values[0];
#pragma GCC unroll 16
  for (int lane = 1; lane < kVector; ++lane) {
    if (values[lane] > largest) largest = values[lane];
  }
  return largest;
}

MEGATRON_KANANA_INLINE float exponential_of(float x) { return exponential(broadcast(x))[0]; }

inline void cross_entropy_statistics(const CrossEntropyProblem& problem, float* statistics,
                                     int64_t row) {
  float block[kBlockWords];
  float largest = kLowestLogit;
  double sum = 0.0;  // of blocks' sums, which are short
  for (int64_t first = 0; first < problem.words; first += kBlockWords) {
    const int64_t count = read_block(problem, row, first, block);
    Floats maxima = broadcast(largest);
    for (int64_t i = 0; i < count; i += kVector) maxima = maximum(load(block + i), maxima);
    const float larger = largest_of(maxima);
    sum *= exponential_of(largest - larger);
    largest = larger;
    Floats sums = {};
    for (int64_t i = 0; i < count; i += kVector) sums += exponential(load(block + i) - largest);
    for (int lane = 0; lane < kVector; ++lane) sum += sums[lane];
  }
  const int64_t label = problem.labels[row] - problem.first_word;
  const bool is_here = label >= 0 && label < problem.words;
  statistics[row] = largest;
  statistics[problem.rows + row] = static_cast<float>(sum);
  statistics[2 * problem.rows + row] = is_here ? logit_of_label(problem, row, label) : 0.0f;
}

inline void cross_entropy_gradient(const CrossEntropyProblem& problem, const float* statistics,
                                   const float* weights, int64_t row) {
  const float largest = statistics[row], weight = weights[row];
  const float factor = weight / statistics[problem.rows + row];
  const int64_t label = problem.labels[row] - problem.first_word;
  const bool is_here = label >= 0 && label < problem.words;
  const float of_label = is_here ? logit_of_label(problem, row, label) : 0.0f;
  float block[kBlockWords];
  for (int64_t first = 0; first < problem.words; first += kBlockWords) {
    const int64_t count = read_block(problem, row, first, block);
    for (int64_t i = 0; i < count; i += kVector) {
      store(block + i, exponential(load(block + i) - largest) * factor);
    }
    const int64_t left = problem.words - first;
    write_row(block, left < kBlockWords ? left : kBlockWords, problem.logits, problem.dtype,
              row * problem.stride + first);
  }
  if (!is_here) return;
  const float corrected = exponential_of(of_label - largest) * factor - weight;
  write_row(&corrected, 1, problem.logits, problem.dtype, row * problem.stride + label);
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

// Cross-entropy of rows of logits on a CPU, and its gradient. Free of torch headers.
#pragma once

#include <cstdint>

#include "strided_rows.h"

namespace megatron_kanana::cpu {

// Logits [rows, words] of a part of the vocabulary.
struct CrossEntropyProblem {
  void* logits;
  Dtype dtype;
  int64_t rows;
  int64_t words;
  int64_t stride;         // elements from one row to the next
  int64_t first_word;     // number of the first word of this part
  const int64_t* labels;  // [rows]
};

// Row `row` of statistics [3, rows]: the largest logit, the sum of exp(logit - largest), and the
// label's logit, which is zero where the label is no word of this part.
void cross_entropy_statistics(const CrossEntropyProblem& problem, float* statistics, int64_t row);

// logits = (exp(logit - largest) / sum - (1 at the label)) * weights[row], in place, with the
// statistics of the whole vocabulary.
void cross_entropy_gradient(const CrossEntropyProblem& problem, const float* statistics,
                            const float* weights, int64_t row);

}  // namespace megatron_kanana::cpu

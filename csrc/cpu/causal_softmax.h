// Causal softmax of attention scores, rows at a time, on a CPU. Free of torch headers.
#pragma once

#include <cstdint>

namespace megatron_kanana::cpu {

// Replaces row[first, stop) by softmax(scale * row[first, stop)) and the rest of the row by zero.
// Returns the largest scaled score that was visible. 0 <= first < stop <= length.
float causal_softmax_row(float* row, int64_t length, int64_t first, int64_t stop, float scale);

// Replaces grad[0, visible) by the gradient with respect to the unscaled scores, given the
// gradient with respect to the probabilities, and the rest of the row by zero.
void causal_softmax_backward_row(float* grad, const float* probabilities, int64_t length,
                                 int64_t visible, float scale);

}  // namespace megatron_kanana::cpu

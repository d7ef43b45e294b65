// Launchers of the cross-entropy kernels, row by row over logits. Free of torch headers; pointers
// are device memory. Rows begin at multiples of 16 bytes. Every result has the same bits run to
// run. All throw std::runtime_error where CUDA refuses.
#pragma once

#include <cstdint>

namespace megatron_kanana {

// Logits [rows, words] of a part of the vocabulary, in bf16 or fp32.
struct CrossEntropySizes {
  int64_t rows;        // below 2^30
  int64_t words;       // below 2^30
  int64_t stride;      // elements from one row to the next
  int64_t first_word;  // number of the first word of this part
  bool bf16;
};

// statistics fp32 [3, rows]: the largest logit, the sum of exp(logit - largest), and the label's
// logit, which is zero where the label is no word of this part. labels [rows].
void cross_entropy_statistics(const CrossEntropySizes& sizes, const void* logits,
                              const int64_t* labels, float* statistics, void* stream);

// logits = (exp(logit - largest) / sum - (1 at the label)) * the row's weight, in place, with the
// statistics of the whole vocabulary. weights fp32 [rows].
void cross_entropy_gradient(const CrossEntropySizes& sizes, void* logits, const int64_t* labels,
                            const float* statistics, const float* weights, void* stream);

// The same in 8 bits (e5m2), beside the logits, which are bf16: gradient [rows, words], and
// transposed [words, rows], whose rows are transposed_stride numbers apart. Rows, words and that
// stride are multiples of 16, rows at most 128 * 65535; transposed begins at a multiple of 8 bytes.
void cross_entropy_gradient_fp8(const CrossEntropySizes& sizes, const void* logits,
                                const int64_t* labels, const float* statistics,
                                const float* weights, void* gradient, void* transposed,
                                int64_t transposed_stride, void* stream);

}  // namespace megatron_kanana

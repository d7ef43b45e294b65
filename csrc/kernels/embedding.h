// Launcher of the embedding's gradient. Free of torch headers; pointers are device memory.
#pragma once

#include <cstdint>

namespace megatron_kanana {

constexpr int kEmbeddingWidthUnit = 8;

// Adds each token's row of grad_out, bf16 [tokens, width], to the row of its word in fp32
// grad_weight [words, width]. words int64 [tokens] ascending, negative ones left out; tokens_of
// int64 [tokens]: whose word it is. Rows begin at multiples of 16 bytes; width is a multiple of
// kEmbeddingWidthUnit. Sums are taken in the order of tokens_of: the same bits run to run. Throws
// std::runtime_error where CUDA refuses.
void embedding_add_gradient(int64_t tokens, int64_t width, const int64_t* words,
                            const int64_t* tokens_of, const void* grad_out, float* grad_weight,
                            void* stream);

}  // namespace megatron_kanana

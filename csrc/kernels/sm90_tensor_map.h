// Descriptions of tensors for the bulk copy engine.
#pragma once

#include <cuda.h>

#include "flash_attention.h"

namespace megatron_kanana::sm90 {

// Boxes of `rows` rows x `columns` columns of one head of a bf16 tensor. The columns fill a swizzle
// of 128 bytes (64 columns) or 64 bytes (32). Throws std::runtime_error.
CUtensorMap attention_tensor_map(const AttentionTensor& tensor, int sequence, int batch, int heads,
                                 int width, int rows, int columns);

// Throws std::runtime_error where the last call or launch failed.
void check_cuda(const char* what);

}  // namespace megatron_kanana::sm90

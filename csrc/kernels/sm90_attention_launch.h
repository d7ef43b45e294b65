// What launching attention needs: descriptions of tensors for the bulk copy engine, the order of
// work, errors.
#pragma once

#include <cuda.h>

#include "flash_attention.h"
#include "sm90_attention_tiles.cuh"

namespace megatron_kanana::sm90 {

// Boxes of `rows` rows x `columns` columns of one head of a bf16 tensor. The columns fill a swizzle
// of 128 bytes (64 columns) or 64 bytes (32). Throws std::runtime_error.
CUtensorMap attention_tensor_map(const AttentionTensor& tensor, int sequence, int batch, int heads,
                                 int width, int rows, int columns);

// Makes the current device's context that of this thread, which describing tensors needs and which
// nothing may have done yet where autograd runs the backward in a thread of its own.
void enter_device();

int multiprocessor_count();

// Groups of about one tile a multiprocessor, so that what their heads read stays in the level-2
// cache; the last of about two, so that its short tiles fill up what its long ones leave.
HeadGroups head_groups(int rows, int heads, int multiprocessors);

// Throws std::runtime_error where the last call or launch failed.
void check_cuda(const char* what);

}  // namespace megatron_kanana::sm90

// What launching attention needs: descriptions of its tensors, and the order of work.
#pragma once

#include "flash_attention.h"
#include "sm90_attention_tiles.cuh"
#include "sm90_launch.h"

namespace megatron_kanana::sm90 {

// Boxes of `rows` rows x `columns` columns of one head of a bf16 tensor.
CUtensorMap attention_tensor_map(const AttentionTensor& tensor, int sequence, int batch, int heads,
                                 int width, int rows, int columns);

// Groups of about one tile a multiprocessor, so that what their heads read stays in the level-2
// cache; the last of about two, so that its short tiles fill up what its long ones leave.
HeadGroups head_groups(int rows, int heads, int multiprocessors);

}  // namespace megatron_kanana::sm90

#include <algorithm>

#include "sm90_attention_launch.h"

namespace megatron_kanana::sm90 {

CUtensorMap attention_tensor_map(const AttentionTensor& tensor, int sequence, int batch, int heads,
                                 int width, int rows, int columns) {
  return bf16_tensor_map(tensor.data, {width, sequence, heads, batch},
                         {tensor.sequence_stride, tensor.head_stride, tensor.batch_stride},
                         {columns, rows, 1, 1});
}

HeadGroups head_groups(int rows, int heads, int multiprocessors) {
  const int group = (multiprocessors + rows - 1) / rows;
  const int tail = 2 * group;
  const int last_group = std::max(0, heads - tail) / group * group;
  return {.rows = rows, .heads = heads, .heads_of_a_group = group, .last_group = last_group};
}

}  // namespace megatron_kanana::sm90

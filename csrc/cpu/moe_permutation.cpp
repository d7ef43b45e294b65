#include <vector>

#include "moe_routing.h"

namespace megatron_kanana::cpu {

void count_tokens(const int32_t* chosen, int64_t tokens, int64_t slots, const bool* padding,
                  int64_t experts, float* counts) {
  std::vector<int64_t> found(experts);
  for (int64_t token = 0; token < tokens; ++token) {
    if (padding != nullptr && padding[token]) continue;
    for (int64_t slot = 0; slot < slots; ++slot) ++found[chosen[token * slots + slot]];
  }
  for (int64_t expert = 0; expert < experts; ++expert) {
    counts[expert] += static_cast<float>(found[expert]);
  }
}

void permute(const int32_t* chosen, int64_t slots, int64_t experts, int32_t* offsets,
             int32_t* slot_of_row, int32_t* row_of_slot) {
  std::vector<int32_t> next(experts);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (chosen[slot] >= 0) ++next[chosen[slot]];
  }
  offsets[0] = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    offsets[expert + 1] = offsets[expert] + next[expert];
    next[expert] = offsets[expert];
  }
  for (int64_t slot = 0; slot < slots; ++slot) {
    row_of_slot[slot] = chosen[slot] < 0 ? -1 : next[chosen[slot]]++;
    if (row_of_slot[slot] >= 0) slot_of_row[row_of_slot[slot]] = static_cast<int32_t>(slot);
  }
}

}  // namespace megatron_kanana::cpu

// What the operations of the experts on CUDA share: sizes and addresses as their kernels take them.
#pragma once

#include <limits>

#include "../kernels/moe.h"
#include "moe_checks.h"

namespace megatron_kanana {

inline int to_int(int64_t size, const char* name) {
  TORCH_CHECK(size <= std::numeric_limits<int>::max() / 2, name, " must be below 2^30, got ", size);
  return static_cast<int>(size);
}

inline void check_experts_limit(int64_t experts) {
  TORCH_CHECK(experts <= kMaxExperts, "there may be at most ", kMaxExperts,
              " experts on CUDA, got ", experts);
}

// Refuses what the products have no kernels for.
inline ExpertSizes product_sizes(const at::Tensor& hidden_states, const ExpertsSizes& sizes) {
  TORCH_CHECK(hidden_states.scalar_type() == at::kBFloat16,
              "hidden_states must be bfloat16 on CUDA, got ", hidden_states.scalar_type());
  TORCH_CHECK(sizes.hidden % kExpertWidthUnit == 0 && sizes.width % kExpertWidthUnit == 0,
              "hidden size and width must be multiples of ", kExpertWidthUnit, " on CUDA, got ",
              sizes.hidden, " and ", sizes.width);
  check_experts_limit(sizes.experts);
  return {to_int(sizes.tokens, "tokens"),  static_cast<int>(sizes.slots),
          static_cast<int>(sizes.experts), to_int(sizes.rows, "rows"),
          to_int(sizes.hidden, "hidden"),  to_int(sizes.width, "width")};
}

// The copy engine's addresses, which torch's own allocations have.
inline const void* aligned_data(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
              " must begin at a multiple of 16 bytes");
  return tensor.const_data_ptr();
}

inline float* gradient_data(const at::Tensor& tensor, const char* name) {
  aligned_data(tensor, name);
  return tensor.mutable_data_ptr<float>();
}

inline ExpertRows rows_of(const at::Tensor& weights, const at::Tensor& offsets,
                          const at::Tensor& slot_of_row, const at::Tensor& row_of_slot) {
  return {offsets.const_data_ptr<int32_t>(), slot_of_row.const_data_ptr<int32_t>(),
          row_of_slot.const_data_ptr<int32_t>(), weights.const_data_ptr<float>()};
}

// One expert of all tokens.
inline ExpertSizes product_sizes(const at::Tensor& hidden_states, const GatedMlpSizes& sizes) {
  return product_sizes(hidden_states,
                       ExpertsSizes{sizes.tokens, 1, sizes.tokens, 1, sizes.hidden, sizes.width});
}

}  // namespace megatron_kanana

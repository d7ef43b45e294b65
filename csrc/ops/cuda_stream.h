// The stream that torch's operations on a CUDA tensor run in, without CUDA's headers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace megatron_kanana {

inline void* current_stream(const at::Tensor& tensor) {
  const c10::impl::VirtualGuardImpl device(tensor.device().type());
  return device.getStream(tensor.device()).native_handle();
}

}  // namespace megatron_kanana

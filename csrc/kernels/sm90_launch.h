// What launching Hopper's kernels needs: descriptions of tensors for the bulk copy engine, errors.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <initializer_list>

namespace megatron_kanana::sm90 {

// A bf16 tensor and the box of it that one copy moves, innermost dimension first. The innermost
// stride is one; `strides` are of the others, in elements. A box's rows of 64 columns fill a
// swizzle of 128 bytes, those of 32 columns one of 64 bytes. Throws std::runtime_error.
CUtensorMap bf16_tensor_map(const void* data, std::initializer_list<int64_t> sizes,
                            std::initializer_list<int64_t> strides, std::initializer_list<int> box);

// The same of fp32, where rows of 32 columns fill a swizzle of 128 bytes.
CUtensorMap fp32_tensor_map(const void* data, std::initializer_list<int64_t> sizes,
                            std::initializer_list<int64_t> strides, std::initializer_list<int> box);

// Makes the current device's context that of this thread, which describing tensors needs and which
// nothing may have done yet where autograd runs the backward in a thread of its own.
void enter_device();

int multiprocessor_count();

// Throws std::runtime_error where the last call or launch failed.
void check_cuda(const char* what);

}  // namespace megatron_kanana::sm90

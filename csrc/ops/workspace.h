// Working memory that a process keeps from call to call: fresh pages can take the operating system
// longer than what is computed in them.
#pragma once

#include <ATen/ops/empty.h>

#include <cstdint>
#include <mutex>

namespace megatron_kanana {

// One call's working memory, in floats; what it asks for in all is known when it begins.
class Workspace {
 public:
  explicit Workspace(int64_t floats) : lock_(kept().mutex, std::try_to_lock) {
    if (!lock_.owns_lock() || floats > kMostKept) {  // used by another thread, or too large to keep
      memory_ = at::empty({floats}, at::kFloat);
      return;
    }
    if (!kept().memory.defined() || kept().memory.numel() < floats) {
      kept().memory = at::empty({floats}, at::kFloat);
    }
    memory_ = kept().memory;
  }

  float* take(int64_t floats) {
    float* const begin = memory_.mutable_data_ptr<float>() + taken_;
    taken_ += floats;
    return begin;
  }

 private:
  static constexpr int64_t kMostKept = 32 << 20;  // floats: 128 MiB

  struct Kept {
    std::mutex mutex;
    at::Tensor memory;
  };

  static Kept& kept() {
    static Kept* const one = new Kept;  // never destroyed: torch may be gone before
    return *one;
  }

  std::unique_lock<std::mutex> lock_;
  at::Tensor memory_;
  int64_t taken_ = 0;
};

}  // namespace megatron_kanana

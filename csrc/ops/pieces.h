// Runs numbered pieces of work on torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace megatron_kanana {

// Calls work(piece, scratch) for every piece, each thread taking the next one when it is done with
// its last: pieces differ in work.
template <class Work>
void for_each_piece(int64_t pieces, int64_t scratch_floats, const Work& work) {
  const int64_t threads = std::min<int64_t>(pieces, at::get_num_threads());
  at::Tensor scratch = at::empty({threads, scratch_floats}, at::kFloat);
  float* const scratch_data = scratch.mutable_data_ptr<float>();
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t piece = next++; piece < pieces; piece = next++) {
      work(piece, scratch_data + begin * scratch_floats);
    }
  });
}

}  // namespace megatron_kanana

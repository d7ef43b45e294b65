// Cross-entropy's rows on Hopper GPUs by csrc/kernels. Needs no CUDA headers. Nothing here waits
// for the device.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "../kernels/cross_entropy.h"
#include "cross_entropy_checks.h"
#include "cuda_stream.h"

namespace megatron_kanana {
namespace {

CrossEntropySizes sizes_of(const at::Tensor& logits, int64_t first_word) {
  const int64_t of_load = 16 / logits.element_size();
  TORCH_CHECK(logits.size(0) < 1 << 30 && logits.size(1) < 1 << 30,
              "logits must have fewer than 2^30 tokens and words on CUDA, got ", logits.sizes());
  TORCH_CHECK(logits.stride(0) % of_load == 0 &&
                  reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % 16 == 0,
              "rows of logits must begin at multiples of 16 bytes on CUDA, got strides ",
              logits.strides());
  return {logits.size(0), logits.size(1), logits.stride(0), first_word,
          logits.scalar_type() == at::kBFloat16};
}

at::Tensor cross_entropy_statistics_cuda(const at::Tensor& logits, const at::Tensor& labels,
                                         int64_t first_word) {
  check_logits(logits, labels);
  const CrossEntropySizes sizes = sizes_of(logits, first_word);
  const c10::DeviceGuard guard(logits.device());
  at::Tensor statistics = at::empty({3, sizes.rows}, logits.options().dtype(at::kFloat));
  cross_entropy_statistics(sizes, logits.const_data_ptr(), labels.const_data_ptr<int64_t>(),
                           statistics.mutable_data_ptr<float>(), current_stream(logits));
  return statistics;
}

void cross_entropy_gradient_cuda(const at::Tensor& logits, const at::Tensor& labels,
                                 int64_t first_word, const at::Tensor& statistics,
                                 const at::Tensor& weights) {
  check_gradient(logits, labels, statistics, weights);
  const CrossEntropySizes sizes = sizes_of(logits, first_word);
  const c10::DeviceGuard guard(logits.device());
  cross_entropy_gradient(sizes, logits.mutable_data_ptr(), labels.const_data_ptr<int64_t>(),
                         statistics.const_data_ptr<float>(), weights.const_data_ptr<float>(),
                         current_stream(logits));
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_kanana, CUDA, library) {
  library.impl("cross_entropy_statistics", cross_entropy_statistics_cuda);
  library.impl("cross_entropy_gradient", cross_entropy_gradient_cuda);
}

}  // namespace megatron_kanana

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

// Of a gradient in 8 bits, in one of both orders; [tokens, words] or [words, tokens].
void check_fp8_gradient(const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                        const at::Tensor& logits) {
  TORCH_CHECK(tensor.sizes() == shape && tensor.scalar_type() == at::kFloat8_e5m2 &&
                  tensor.device() == logits.device(),
              name, " must be float8_e5m2 ", shape, " on ", logits.device(), ", got ",
              tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
  TORCH_CHECK(tensor.stride(1) == 1 && tensor.stride(0) >= tensor.size(1) &&
                  tensor.stride(0) % 16 == 0 &&
                  reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
              "rows of ", name, " must be contiguous, apart, and begin at multiples of 16 bytes, ",
              "got strides ", tensor.strides());
}

void cross_entropy_gradient_fp8_cuda(const at::Tensor& logits, const at::Tensor& labels,
                                     int64_t first_word, const at::Tensor& statistics,
                                     const at::Tensor& weights, const at::Tensor& gradient,
                                     const at::Tensor& transposed) {
  check_gradient(logits, labels, statistics, weights);
  const int64_t tokens = logits.size(0), words = logits.size(1);
  TORCH_CHECK(logits.scalar_type() == at::kBFloat16, "logits must be bfloat16, got ",
              logits.scalar_type());
  TORCH_CHECK(tokens % 16 == 0 && words % 16 == 0 && tokens <= int64_t(128) * 65535,
              "tokens and words must be multiples of 16, and tokens at most 8388480, got ",
              logits.sizes());
  check_fp8_gradient(gradient, "gradient", {tokens, words}, logits);
  TORCH_CHECK(gradient.is_contiguous(), "gradient must be contiguous, got strides ",
              gradient.strides());
  check_fp8_gradient(transposed, "transposed", {words, tokens}, logits);
  const CrossEntropySizes sizes = sizes_of(logits, first_word);
  const c10::DeviceGuard guard(logits.device());
  cross_entropy_gradient_fp8(sizes, logits.const_data_ptr(), labels.const_data_ptr<int64_t>(),
                             statistics.const_data_ptr<float>(), weights.const_data_ptr<float>(),
                             gradient.mutable_data_ptr(), transposed.mutable_data_ptr(),
                             transposed.stride(0), current_stream(logits));
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_kanana, CUDA, library) {
  library.impl("cross_entropy_statistics", cross_entropy_statistics_cuda);
  library.impl("cross_entropy_gradient", cross_entropy_gradient_cuda);
  library.impl("cross_entropy_gradient_fp8", cross_entropy_gradient_fp8_cuda);
}

}  // namespace megatron_kanana

// torch.library schemas of cross-entropy's rows, and their implementation on a CPU by csrc/cpu.
#include "../cpu/cross_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cross_entropy_checks.h"
#include "pieces.h"

namespace megatron_kanana {
namespace {

cpu::CrossEntropyProblem problem_of(const at::Tensor& logits, const at::Tensor& labels,
                                    int64_t first_word) {
  const bool fp32 = logits.scalar_type() == at::kFloat;
  return {const_cast<void*>(logits.const_data_ptr()),
          fp32 ? cpu::Dtype::kFloat32 : cpu::Dtype::kBfloat16,
          logits.size(0),
          logits.size(1),
          logits.stride(0),
          first_word,
          labels.const_data_ptr<int64_t>()};
}

at::Tensor cross_entropy_statistics(const at::Tensor& logits, const at::Tensor& labels,
                                    int64_t first_word) {
  check_logits(logits, labels);
  const cpu::CrossEntropyProblem problem = problem_of(logits, labels, first_word);
  at::Tensor statistics = at::empty({3, problem.rows}, logits.options().dtype(at::kFloat));
  float* const data = statistics.mutable_data_ptr<float>();
  for_each_piece(problem.rows, 0,
                 [&](int64_t row, float*) { cpu::cross_entropy_statistics(problem, data, row); });
  return statistics;
}

void cross_entropy_gradient(const at::Tensor& logits, const at::Tensor& labels, int64_t first_word,
                            const at::Tensor& statistics, const at::Tensor& weights) {
  check_gradient(logits, labels, statistics, weights);
  const cpu::CrossEntropyProblem problem = problem_of(logits, labels, first_word);
  for_each_piece(problem.rows, 0, [&](int64_t row, float*) {
    cpu::cross_entropy_gradient(problem, statistics.const_data_ptr<float>(),
                                weights.const_data_ptr<float>(), row);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_kanana, library) {
  library.def(
      "cross_entropy_statistics(Tensor logits, Tensor labels, int first_word) -> Tensor "
      "statistics");
  library.def(
      "cross_entropy_gradient(Tensor(a!) logits, Tensor labels, int first_word, "
      "Tensor statistics, Tensor weights) -> ()");
  library.def(
      "cross_entropy_gradient_fp8(Tensor logits, Tensor labels, int first_word, "
      "Tensor statistics, Tensor weights, Tensor(a!) gradient, Tensor(b!) transposed) -> ()");
}

TORCH_LIBRARY_IMPL(megatron_kanana, CPU, library) {
  library.impl("cross_entropy_statistics", cross_entropy_statistics);
  library.impl("cross_entropy_gradient", cross_entropy_gradient);
}

}  // namespace megatron_kanana

// torch.library bindings of csrc/cpu/causal_softmax.h. Shapes are checked here, nowhere else.
#include "../cpu/causal_softmax.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

namespace megatron_kanana {
namespace {

// Rows a thread takes at a time: enough that starting a thread costs little beside them.
constexpr int64_t kGrainRows = 64;

void check_scores(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 3 && tensor.size(1) == tensor.size(2), name,
              " must have shape [matrices, sequence, sequence], got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, name, " must be float32, got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// The first key each query sees, by sample: matrices come sample by sample, equally many of each.
// Without a tensor every query sees from the first key on.
class FirstKeys {
 public:
  FirstKeys(const std::optional<at::Tensor>& first_keys, int64_t matrices, int64_t length)
      : length_(length) {
    if (!first_keys.has_value()) return;
    TORCH_CHECK(first_keys->dim() == 2 && first_keys->size(0) > 0 &&
                    matrices % first_keys->size(0) == 0 && first_keys->size(1) == length,
                "first_keys must have shape [samples, sequence] for ", matrices, " matrices of ",
                length, " rows, got ", first_keys->sizes());
    TORCH_CHECK(first_keys->scalar_type() == at::kInt, "first_keys must be int32, got ",
                first_keys->scalar_type());
    TORCH_CHECK(first_keys->is_contiguous(), "first_keys must be contiguous");
    data_ = first_keys->const_data_ptr<int32_t>();
    rows_of_a_sample_ = matrices / first_keys->size(0) * length;
  }

  // Of a row of all matrices; never after the query itself.
  int64_t of_row(int64_t row) const {
    const int64_t query = row % length_;
    if (data_ == nullptr) return 0;
    return std::clamp<int64_t>(data_[row / rows_of_a_sample_ * length_ + query], 0, query);
  }

 private:
  const int32_t* data_ = nullptr;
  int64_t length_;
  int64_t rows_of_a_sample_ = 1;
};

// Softmax in place over the keys a query may see; returns each query's largest scaled score,
// [matrices, sequence].
at::Tensor causal_softmax_(at::Tensor& scores, double scale,
                           const std::optional<at::Tensor>& first_keys) {
  check_scores(scores, "scores");
  const int64_t matrices = scores.size(0);
  const int64_t length = scores.size(1);
  const FirstKeys first(first_keys, matrices, length);
  at::Tensor row_max = at::empty({matrices, length}, scores.options());
  float* data = scores.mutable_data_ptr<float>();
  float* row_max_data = row_max.mutable_data_ptr<float>();
  at::parallel_for(0, matrices * length, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      row_max_data[row] = cpu::causal_softmax_row(data + row * length, length, first.of_row(row),
                                                  row % length + 1, static_cast<float>(scale));
    }
  });
  return row_max;
}

// Turns the gradient of the probabilities, in place, into the gradient of the unscaled scores.
// Probabilities that are zero, as hidden ones are, give zero.
void causal_softmax_backward_(at::Tensor& grad, const at::Tensor& probabilities, double scale) {
  check_scores(grad, "grad");
  check_scores(probabilities, "probabilities");
  TORCH_CHECK(grad.sizes() == probabilities.sizes(),
              "grad and probabilities differ in shape: ", grad.sizes(), " and ",
              probabilities.sizes());
  const int64_t length = grad.size(1);
  float* grad_data = grad.mutable_data_ptr<float>();
  const float* probabilities_data = probabilities.const_data_ptr<float>();
  at::parallel_for(0, grad.size(0) * length, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      cpu::causal_softmax_backward_row(grad_data + row * length, probabilities_data + row * length,
                                       length, row % length + 1, static_cast<float>(scale));
    }
  });
}

}  // namespace

TORCH_LIBRARY(megatron_kanana, library) {
  library.def("causal_softmax_(Tensor(a!) scores, float scale, Tensor? first_keys=None) -> Tensor");
  library.def("causal_softmax_backward_(Tensor(a!) grad, Tensor probabilities, float scale) -> ()");
}

TORCH_LIBRARY_IMPL(megatron_kanana, CPU, library) {
  library.impl("causal_softmax_", causal_softmax_);
  library.impl("causal_softmax_backward_", causal_softmax_backward_);
}

}  // namespace megatron_kanana

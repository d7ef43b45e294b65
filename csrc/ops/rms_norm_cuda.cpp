// torch.library schemas of RMSNorm and the embedding's gradient, which exist on Hopper GPUs alone:
// elsewhere torch's own do. Nothing here waits for the device.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "../kernels/embedding.h"
#include "../kernels/rms_norm.h"
#include "cuda_stream.h"

namespace megatron_kanana {
namespace {

void check(const at::Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType dtype,
           at::Device device) {
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.device() == device, name, " must be on ", device, ", got ", tensor.device());
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
  TORCH_CHECK(
      dtype != at::kBFloat16 || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
      name, " must begin at a multiple of 16 bytes");
}

RmsNormSizes check_norm(const at::Tensor& in, const at::Tensor& gain, bool zero_centered) {
  TORCH_CHECK(in.dim() == 2, "in must have shape [rows, width], got ", in.sizes());
  const int64_t width = in.size(1);
  TORCH_CHECK(width > 0 && width <= kMaxNormWidth && width % kNormWidthUnit == 0,
              "a norm's width must be a multiple of ", kNormWidthUnit, " and at most ",
              kMaxNormWidth, ", got ", width);
  TORCH_CHECK(in.scalar_type() == at::kBFloat16, "in must be bfloat16, got ", in.scalar_type());
  TORCH_CHECK(in.stride(1) == 1 && in.stride(0) >= width && in.stride(0) % kNormWidthUnit == 0 &&
                  reinterpret_cast<uintptr_t>(in.const_data_ptr()) % 16 == 0,
              "rows of in must begin at multiples of 16 bytes, got strides ", in.strides());
  TORCH_CHECK(in.size(0) < int64_t{1} << 31, "in must have fewer than 2^31 rows, got ", in.size(0));
  check(gain, "gain", {width}, at::kBFloat16, in.device());
  return {in.size(0), static_cast<int>(width), in.stride(0), zero_centered};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_forward_cuda(const at::Tensor& in,
                                                         const at::Tensor& gain, double epsilon,
                                                         bool zero_centered) {
  const RmsNormSizes sizes = check_norm(in, gain, zero_centered);
  const c10::DeviceGuard guard(in.device());
  at::Tensor out = at::empty(in.sizes(), in.options());
  at::Tensor reciprocal = at::empty({sizes.rows}, in.options().dtype(at::kFloat));
  rms_norm_forward(sizes, in.const_data_ptr(), gain.const_data_ptr(), static_cast<float>(epsilon),
                   out.mutable_data_ptr(), reciprocal.mutable_data_ptr<float>(),
                   current_stream(in));
  return {out, reciprocal};
}

at::Tensor rms_norm_backward_cuda(const at::Tensor& grad_out, const at::Tensor& in,
                                  const at::Tensor& reciprocal, const at::Tensor& gain,
                                  bool zero_centered, const at::Tensor& grad_gain) {
  const RmsNormSizes sizes = check_norm(in, gain, zero_centered);
  check(grad_out, "grad_out", in.sizes(), at::kBFloat16, in.device());
  check(reciprocal, "reciprocal", {sizes.rows}, at::kFloat, in.device());
  check(grad_gain, "grad_gain", gain.sizes(), at::kFloat, in.device());
  const c10::DeviceGuard guard(in.device());
  at::Tensor grad_in = at::empty(in.sizes(), in.options());
  at::Tensor parts =
      at::empty({rms_norm_gain_parts(sizes), sizes.width}, in.options().dtype(at::kFloat));
  rms_norm_backward(sizes, grad_out.const_data_ptr(), in.const_data_ptr(),
                    reciprocal.const_data_ptr<float>(), gain.const_data_ptr(),
                    grad_in.mutable_data_ptr(), parts.mutable_data_ptr<float>(),
                    grad_gain.mutable_data_ptr<float>(), current_stream(in));
  return grad_in;
}

void embedding_add_gradient_cuda(const at::Tensor& words, const at::Tensor& tokens_of,
                                 const at::Tensor& grad_out, const at::Tensor& grad_weight) {
  TORCH_CHECK(grad_out.dim() == 2 && grad_weight.dim() == 2,
              "grad_out must have shape [tokens, width] and grad_weight [words, width], got ",
              grad_out.sizes(), " and ", grad_weight.sizes());
  const int64_t tokens = grad_out.size(0), width = grad_out.size(1);
  TORCH_CHECK(width % kEmbeddingWidthUnit == 0, "an embedding's width must be a multiple of ",
              kEmbeddingWidthUnit, ", got ", width);
  TORCH_CHECK(tokens < int64_t{1} << 31, "fewer than 2^31 tokens are taken, got ", tokens);
  const at::Device device = grad_out.device();
  check(grad_out, "grad_out", {tokens, width}, at::kBFloat16, device);
  check(grad_weight, "grad_weight", {grad_weight.size(0), width}, at::kFloat, device);
  check(words, "words", {tokens}, at::kLong, device);
  check(tokens_of, "tokens_of", {tokens}, at::kLong, device);
  const c10::DeviceGuard guard(device);
  embedding_add_gradient(tokens, width, words.const_data_ptr<int64_t>(),
                         tokens_of.const_data_ptr<int64_t>(), grad_out.const_data_ptr(),
                         grad_weight.mutable_data_ptr<float>(), current_stream(grad_out));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_kanana, library) {
  library.def(
      "rms_norm_forward(Tensor input, Tensor gain, float epsilon, bool zero_centered) -> "
      "(Tensor out, Tensor reciprocal)");
  library.def(
      "rms_norm_backward(Tensor grad_out, Tensor input, Tensor reciprocal, Tensor gain, "
      "bool zero_centered, Tensor(a!) grad_gain) -> Tensor grad_input");
  library.def(
      "embedding_add_gradient(Tensor words, Tensor tokens_of, Tensor grad_out, "
      "Tensor(a!) grad_weight) -> ()");
}

TORCH_LIBRARY_IMPL(megatron_kanana, CUDA, library) {
  library.impl("rms_norm_forward", rms_norm_forward_cuda);
  library.impl("rms_norm_backward", rms_norm_backward_cuda);
  library.impl("embedding_add_gradient", embedding_add_gradient_cuda);
}

}  // namespace megatron_kanana

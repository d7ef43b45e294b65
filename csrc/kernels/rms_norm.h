// Launchers of RMSNorm (arXiv:1910.07467), bf16 with fp32 inside. Free of torch headers; pointers
// are device memory, rows begin at multiples of 16 bytes. Every result has the same bits run to
// run. All throw std::runtime_error where CUDA refuses.
#pragma once

#include <cstdint>

namespace megatron_kanana {

constexpr int kNormWidthUnit = 8;
constexpr int kMaxNormWidth = 16384;

struct RmsNormSizes {
  int64_t rows;
  int width;           // a multiple of kNormWidthUnit, at most kMaxNormWidth
  int64_t stride;      // elements from one row of the input to the next
  bool zero_centered;  // the gain is one more than what is given
};

// out [rows, width] = in / rms * gain; reciprocal fp32 [rows]: 1 / rms, with
// rms = sqrt(mean of squares + epsilon).
void rms_norm_forward(const RmsNormSizes& sizes, const void* in, const void* gain, float epsilon,
                      void* out, float* reciprocal, void* stream);

// Blocks of rms_norm_backward, each of which leaves a part of the gain's gradient.
int rms_norm_gain_parts(const RmsNormSizes& sizes);

// grad_in [rows, width]; the gain's gradient is added to fp32 grad_gain [width]. gain_parts: fp32
// [rms_norm_gain_parts, width] to work in.
void rms_norm_backward(const RmsNormSizes& sizes, const void* grad_out, const void* in,
                       const float* reciprocal, const void* gain, void* grad_in, float* gain_parts,
                       float* grad_gain, void* stream);

}  // namespace megatron_kanana

// The gradient of cross-entropy in 8 bits (e5m2), in both orders, in one pass over the logits: a
// block takes 128 x 128 of them, so that what it reads and writes are whole lines of memory.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cross_entropy.h"
#include "elements.cuh"
#include "exponential.cuh"
#include "sm90_launch.h"

namespace megatron_kanana {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;                    // tokens and words of a block
constexpr int kAtOnce = 8;                    // words of a thread: 16 bytes of bf16
constexpr int kRowThreads = kTile / kAtOnce;  // that share a row
constexpr int kRowsAtOnce = kThreads / kRowThreads;
constexpr int kPasses = kTile / kRowsAtOnce;
constexpr int kQuad = 4;  // words of 32 bits
constexpr int kQuads = kTile / kQuad;
constexpr int kTurnPasses = kQuads * kTile / kAtOnce / kThreads;

// Where four words of a token lie in shared memory, so that threads that read eight tokens each,
// and sixteen of them all tokens, find them in different banks.
__device__ __forceinline__ int quad_at(int token, int quad) {
  return token * (kQuads + 1) + token / 32 * 2 + quad;
}

// Two numbers, rounded to the nearest; what is beyond the largest becomes the largest.
__device__ __forceinline__ uint32_t pack_e5m2(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_e5m2(float a, float b, float c, float d) {
  return pack_e5m2(a, b) | pack_e5m2(c, d) << 16;
}

// The same byte of four words.
__device__ __forceinline__ uint32_t byte_of_each(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                                 int byte) {
  const uint32_t choice = byte | (byte + 4) << 4;
  return __byte_perm(__byte_perm(a, b, choice), __byte_perm(c, d, choice), 0x5410);
}

__global__ void __launch_bounds__(kThreads)
    gradient_fp8_kernel(CrossEntropySizes sizes, const __nv_bfloat16* __restrict__ logits,
                        const int64_t* __restrict__ labels, const float* __restrict__ statistics,
                        const float* __restrict__ weights, uint8_t* __restrict__ gradient,
                        uint8_t* __restrict__ transposed, int64_t transposed_stride) {
  __shared__ uint32_t tile[kTile * (kQuads + 1) + kTile / 32 * 2];
  const int64_t first_row = int64_t(blockIdx.y) * kTile, first_word = int64_t(blockIdx.x) * kTile;
  const int row = threadIdx.x / kRowThreads, column = threadIdx.x % kRowThreads * kAtOnce;
  const int64_t word = first_word + column;
  uint4 loaded[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t at = first_row + pass * kRowsAtOnce + row;
    if (at < sizes.rows && word < sizes.words) {
      loaded[pass] = __ldcs(reinterpret_cast<const uint4*>(logits + at * sizes.stride + word));
    }
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int in_tile = pass * kRowsAtOnce + row;
    const int64_t at = first_row + in_tile;
    if (at >= sizes.rows || word >= sizes.words) continue;
    const float maximum = statistics[at], weight = weights[at];
    const float factor = weight / statistics[sizes.rows + at];
    const int64_t to_label = labels[at] - sizes.first_word - word;
    const int of_label = to_label >= 0 && to_label < kAtOnce ? static_cast<int>(to_label) : -1;
    Elements<true> numbers(loaded[pass]);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float& value = numbers.values[i];
      value = exponential(value - maximum) * factor;
      if (of_label == i) value -= weight;
    }
    const float (&values)[kAtOnce] = numbers.values;
    const uint2 packed = {pack_e5m2(values[0], values[1], values[2], values[3]),
                          pack_e5m2(values[4], values[5], values[6], values[7])};
    *reinterpret_cast<uint2*>(gradient + at * sizes.words + word) = packed;
    tile[quad_at(in_tile, column / kQuad)] = packed.x;
    tile[quad_at(in_tile, column / kQuad + 1)] = packed.y;
  }
  __syncthreads();
  const int token = threadIdx.x % kRowThreads * kAtOnce;
  if (first_row + token >= sizes.rows) return;
#pragma unroll
  for (int pass = 0; pass < kTurnPasses; ++pass) {
    const int quad = pass * kRowsAtOnce + threadIdx.x / kRowThreads;
    if (first_word + quad * kQuad >= sizes.words) return;
    uint32_t of_token[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) of_token[i] = tile[quad_at(token + i, quad)];
    const int64_t to = (first_word + quad * kQuad) * transposed_stride + first_row + token;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const uint2 of_word = {byte_of_each(of_token[0], of_token[1], of_token[2], of_token[3], i),
                             byte_of_each(of_token[4], of_token[5], of_token[6], of_token[7], i)};
      *reinterpret_cast<uint2*>(transposed + to + i * transposed_stride) = of_word;
    }
  }
}

}  // namespace

void cross_entropy_gradient_fp8(const CrossEntropySizes& sizes, const void* logits,
                                const int64_t* labels, const float* statistics,
                                const float* weights, void* gradient, void* transposed,
                                int64_t transposed_stride, void* stream) {
  if (sizes.rows == 0) return;
  const dim3 blocks(static_cast<unsigned>((sizes.words + kTile - 1) / kTile),
                    static_cast<unsigned>((sizes.rows + kTile - 1) / kTile));
  gradient_fp8_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      sizes, static_cast<const __nv_bfloat16*>(logits), labels, statistics, weights,
      static_cast<uint8_t*>(gradient), static_cast<uint8_t*>(transposed), transposed_stride);
  sm90::check_cuda("cross_entropy_gradient_fp8");
}

}  // namespace megatron_kanana

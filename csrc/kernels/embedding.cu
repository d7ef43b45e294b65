// The embedding's gradient. Tokens are sorted by word, and the block of a word's first token sums
// all its tokens' rows, 256 columns of them: each warp every eighth row, added up in order at the
// end. Rows of words that no token has are not touched.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "elements.cuh"
#include "embedding.h"
#include "sm90_launch.h"
#include "sm90_primitives.cuh"

namespace megatron_kanana {
namespace {

using sm90::kWarp;

constexpr int kWarps = 8;
constexpr int kColumns = kWarp * 8;  // of a block
constexpr int kAtOnce = 4;           // rows of a warp that are under way together

__global__ void __launch_bounds__(kWarp* kWarps)
    embedding_add_kernel(int64_t tokens, int64_t width, const int64_t* words,
                         const int64_t* tokens_of, const __nv_bfloat16* grad_out,
                         float* grad_weight) {
  const int64_t first = blockIdx.x;
  const int64_t word = words[first];
  if (word < 0 || (first > 0 && words[first - 1] == word)) return;
  __shared__ float shared[kWarps][kColumns];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t column = int64_t(blockIdx.y) * kColumns + lane * 8;
  float sums[8] = {};
  for (int64_t place = first + warp;; place += kWarps * kAtOnce) {
    uint4 rows[kAtOnce];
    bool any = false;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = place + i * kWarps;
      const bool counts = at < tokens && words[at] == word;
      any |= counts;
      rows[i] = counts && column < width
                    ? *reinterpret_cast<const uint4*>(grad_out + tokens_of[at] * width + column)
                    : make_uint4(0, 0, 0, 0);
    }
    if (!any) break;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Elements<true> row(rows[i]);
#pragma unroll
      for (int each = 0; each < 8; ++each) sums[each] += row.values[each];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) shared[warp][lane * 8 + i] = sums[i];
  __syncthreads();
  const int64_t own = int64_t(blockIdx.y) * kColumns + threadIdx.x;
  if (own >= width) return;
  float sum = 0.0f;
#pragma unroll
  for (int each = 0; each < kWarps; ++each) sum += shared[each][threadIdx.x];
  grad_weight[word * width + own] += sum;
}

}  // namespace

void embedding_add_gradient(int64_t tokens, int64_t width, const int64_t* words,
                            const int64_t* tokens_of, const void* grad_out, float* grad_weight,
                            void* stream) {
  if (tokens == 0) return;
  const dim3 blocks(static_cast<unsigned>(tokens),
                    static_cast<unsigned>((width + kColumns - 1) / kColumns));
  embedding_add_kernel<<<blocks, kWarp * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(
      tokens, width, words, tokens_of, static_cast<const __nv_bfloat16*>(grad_out), grad_weight);
  sm90::check_cuda("embedding_add_gradient");
}

}  // namespace megatron_kanana

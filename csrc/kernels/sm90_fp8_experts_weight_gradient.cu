// Gradients of the experts' weights in fp8, all experts in one launch, as
// sm90_experts_weight_gradient.cu has them in bf16.
//
// A block holds 128 columns of the tokens' rows and 256 of the rows in order, and walks over the
// expert's rows, 128 at a time. One warpgroup loads: the tokens' rows, where they are gathered, by
// 16-byte copies of single threads, else like the rows in order, which are column tiles
// (sm90_fp8_column_tiles.cuh), by the bulk copy engine. Two warpgroups multiply; the copy engine
// adds their sums to those in memory while the next tile is multiplied.
#include <cuda_runtime.h>

#include "sm90_fp8_experts_launch.h"
#include "sm90_fp8_weight_gradient_loading.cuh"

namespace megatron_kanana {
namespace sm90 {
namespace {

constexpr int kBoxColumns = 32;  // of fp32 sums, 128 bytes
constexpr int kBoxRows = 16;     // those of a warp

// A warpgroup has the products of 64 of the tokens' columns and 256 of the rows in order, in two
// parts of 64 x 128. Row r of a warp's 16 is column 2r, or 2(r - 8) + 1: of two columns that lie
// side by side a thread has both.
constexpr int kParts = 2;
using Sums = float[kParts][64];

// Operand A of 32 of a stage's rows: a warp's 16 columns of them turned in registers, for tensor
// cores take 8 bits along the summed dimension alone. Rows are in the order of column tiles.
__device__ __forceinline__ void turn(uint32_t tokens, int k, int warpgroup, uint32_t (&a)[4]) {
  const int warp = threadIdx.x % kWarpgroup / kWarp, row = k * kWarp + threadIdx.x % kWarp;
  const int sixteen = warpgroup * 4 + warp;
  uint32_t pairs[4];  // two columns of rows 8i + 2c and 8i + 2c + 1
  load_transposed_matrices(tokens + row * 128 + (sixteen ^ (row % 8)) * 16, pairs[0], pairs[1],
                           pairs[2], pairs[3]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[2 * i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x6240);
    a[2 * i + 1] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7351);
  }
}

// Products of a stage, scaled and added to the sums.
__device__ __forceinline__ void multiply_stage(WeightGradientTile::Stage& stage, int warpgroup,
                                               const float (&factors)[kParts], uint64_t* empty,
                                               Sums& sums) {
  constexpr int kSteps = kStageRows / 32, kStepsOfAHalf = kSteps / kHalves;
  uint32_t turned[kSteps][4];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) turn(shared_address(stage.tokens), k, warpgroup, turned[k]);
  const uint64_t rows = descriptor<Swizzle::k64>(shared_address(stage.rows));
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float partial[64];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint32_t half = k / kStepsOfAHalf * WeightGradientTile::kHalfBytes;
      wgmma_e4m3(partial, turned[k],
                 advance(rows, half + part * 128 * kColumnTileRows + k % kStepsOfAHalf * 32),
                 k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(partial);
    if (part == kParts - 1 && threadIdx.x % kWarp == 0) barrier_arrive(empty);
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[part][i] += partial[i] * factors[part];
  }
}

// Has the copy engine add a box of sums, or write it where there are none yet.
__device__ __forceinline__ void add_sums_of(const WeightGradientArguments& arguments,
                                            const float* box, int column, int row, int expert) {
  if (arguments.overwrites) {
    store_box(&arguments.gradient, box, column, row, expert);
  } else {
    add_box(&arguments.gradient, box, column, row, expert);
  }
}

// Adds a warpgroup's sums to a gradient [tokens' columns, columns of the rows in order], 64 columns
// at a time, each warp those of its rows. Outside the gradient it adds nothing.
__device__ __forceinline__ void add_sums(const WeightGradientArguments& arguments, const Work& work,
                                         int warpgroup, const Sums& sums,
                                         WeightGradientTile::Shared& shared) {
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int piece = 0; piece < 2 * kParts; ++piece) {
    auto& buffer = shared.sums[warpgroup][piece % 2];  // [warp][box][row][column]
    float* const boxes = buffer + warp * 2 * kBoxRows * kBoxColumns;
    if (lane == 0) bulk_wait_read<1>();
    __syncwarp();
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      const int row = lane / 4 * 2, sixteen = block % 4 * 2 + lane % 4 / 2;
      const float* four = sums[piece / 2] + piece % 2 * 32 + block * 4;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        store_floats(shared_address(boxes) + block / 4 * kBoxRows * 128 + (row + odd) * 128 +
                         (sixteen ^ ((row + odd) % 8)) * 16 + lane % 2 * 8,
                     four[2 * odd], four[2 * odd + 1]);
      }
    }
    fence_shared_for_async();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        add_sums_of(arguments, boxes + box * kBoxRows * kBoxColumns,
                    work.row_column + piece * 64 + box * kBoxColumns,
                    work.token_column + warpgroup * 64 + warp * kBoxRows, work.expert);
      }
      bulk_commit();
    }
  }
}

// The same of a gradient [columns of the rows in order, tokens' columns], 64 rows of it at a time.
__device__ __forceinline__ void add_turned_sums(const WeightGradientArguments& arguments,
                                                const Work& work, int warpgroup, const Sums& sums,
                                                WeightGradientTile::Shared& shared) {
  constexpr int kRows = 64;
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
  const bool leader = threadIdx.x % kWarpgroup == 0;
#pragma unroll
  for (int piece = 0; piece < 2 * kParts; ++piece) {
    auto& buffer = shared.sums[warpgroup][piece % 2];  // [box][row][column]
    if (leader) bulk_wait_read<1>();
    named_sync(1 + warpgroup, kWarpgroup);
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      const int row = block * 8 + lane % 4 * 2, sixteen = warp % 2 * 4 + lane / 8;
      const float* four = sums[piece / 2] + piece % 2 * 32 + block * 4;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        store_floats(shared_address(buffer) + warp / 2 * kRows * 128 + (row + odd) * 128 +
                         (sixteen ^ ((row + odd) % 8)) * 16 + lane / 4 % 2 * 8,
                     four[odd], four[2 + odd]);
      }
    }
    fence_shared_for_async();
    named_sync(1 + warpgroup, kWarpgroup);
    if (leader) {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        add_sums_of(arguments, buffer + box * kRows * kBoxColumns,
                    work.token_column + warpgroup * 64 + box * kBoxColumns,
                    work.row_column + piece * kRows, work.expert);
      }
      bulk_commit();
    }
  }
}

template <bool kTokensFirst>
__device__ void multiply_rows(const WeightGradientArguments& arguments,
                              WeightGradientTile::Shared& shared, int tiles, int warpgroup) {
  const int blocks = arguments.width / kScaleBlock;
  Ring<WeightGradientTile::kStages> ring;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Work work = Work::of(arguments, tile);
    const int steps = work.steps();
    if (steps == 0) continue;
    const float* scales = arguments.scales + int64_t(work.column_tile) * blocks;
    const int first = work.row_column / kScaleBlock;
    // What a block beyond the last one comes to is left out at the end.
    const int second = min(first + 1, blocks - 1);
    Sums sums = {};
    float next[kParts] = {__ldg(scales + first), __ldg(scales + second)};
    for (int step = 0; step < steps; ++step, ring.advance()) {
      const float factors[kParts] = {next[0], next[1]};
      if (step + 1 < steps) {
        scales += kHalves * blocks;
        next[0] = __ldg(scales + first);
        next[1] = __ldg(scales + second);
      }
      barrier_wait(&shared.full[ring.stage], ring.parity);
      multiply_stage(shared.stages[ring.stage], warpgroup, factors, &shared.empty[ring.stage],
                     sums);
    }
    if constexpr (kTokensFirst) {
      add_sums(arguments, work, warpgroup, sums, shared);
    } else {
      add_turned_sums(arguments, work, warpgroup, sums, shared);
    }
  }
  if (threadIdx.x % kWarp == 0) bulk_wait();
}

template <bool kGather, bool kTokensFirst>
__global__ void __launch_bounds__(WeightGradientTile::kThreads, 1)
    fp8_weight_gradient_kernel(const __grid_constant__ WeightGradientArguments arguments,
                               int tiles) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<WeightGradientTile::Shared*>(memory);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  prepare_stages(shared.full, shared.empty, kWarpgroup + 1, 2 * kWarpgroup / kWarp);
  if (warpgroup == 0) {
    give_registers<40>();
    load_rows<kGather>(arguments, shared, tiles);
  } else {
    take_registers<232>();
    multiply_rows<kTokensFirst>(arguments, shared, tiles, warpgroup - 1);
  }
}

template <bool kTokensFirst>
void launch(const ExpertSizes& sizes, const ExpertRows& rows, const void* tokens,
            const Fp8Columns& in_order, int width, float* gradient, bool sums_are_zero,
            const char* name, void* stream) {
  if (sizes.rows == 0) return;
  enter_device();
  const int height = kTokensFirst ? sizes.hidden_size : width;
  const int across = kTokensFirst ? width : sizes.hidden_size;
  WeightGradientArguments arguments{
      .columns = static_cast<const uint8_t*>(in_order.data),
      .scales = in_order.scales,
      .width = width,
      .tokens = static_cast<const uint8_t*>(tokens),
      .token_width = sizes.hidden_size,
      .token_of_row = gathered_rows(sizes, rows, nullptr),
      .ordered_tokens = ordered_rows_map(tokens, sizes.tokens, sizes.hidden_size / 2,
                                         sizes.hidden_size / 2, kStageRows),
      .groups = row_groups(sizes, rows),
      .gradient = fp32_tensor_map(gradient, {across, height, sizes.experts},
                                  {across, int64_t(across) * height},
                                  {kBoxColumns, kTokensFirst ? kBoxRows : 64, 1}),
      .overwrites = sums_are_zero,
      .row_parts = 1,
  };
  // One expert has few tiles for all multiprocessors. Two sums are the same in either order, if
  // there is no third.
  if (sizes.experts == 1 && sums_are_zero && Work::count(arguments) > multiprocessor_count()) {
    arguments.row_parts = 2;
    arguments.overwrites = false;
  }
  const auto kernel = are_gathered(rows) ? fp8_weight_gradient_kernel<true, kTokensFirst>
                                         : fp8_weight_gradient_kernel<false, kTokensFirst>;
  constexpr int kSharedBytes = sizeof(WeightGradientTile::Shared);
  static_assert(kSharedBytes <= 227 * 1024);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  kernel<<<multiprocessor_count(), WeightGradientTile::kThreads, kSharedBytes,
           static_cast<cudaStream_t>(stream)>>>(arguments, Work::count(arguments));
  check_cuda(name);
}

}  // namespace
}  // namespace sm90

void fp8_experts_grad_down(const ExpertSizes& sizes, const ExpertRows& rows, const void* grad_out,
                           const Fp8Columns& activation, float* grad_down, bool sums_are_zero,
                           void* stream) {
  sm90::launch<true>(sizes, rows, grad_out, activation, sizes.width, grad_down, sums_are_zero,
                     "fp8_experts_grad_down", stream);
}

void fp8_experts_grad_gate_up(const ExpertSizes& sizes, const ExpertRows& rows,
                              const Fp8Columns& gradient, const void* hidden_states,
                              float* grad_gate_up, bool sums_are_zero, void* stream) {
  sm90::launch<false>(sizes, rows, hidden_states, gradient, 2 * sizes.width, grad_gate_up,
                      sums_are_zero, "fp8_experts_grad_gate_up", stream);
}

}  // namespace megatron_kanana

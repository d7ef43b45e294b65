// Gradients of the experts' weights, all experts in one launch: each expert's sum over its rows of
// an outer product of a token's row (gathered) with a row in order, added to fp32 numbers.
//
// A block holds 128 columns of the tokens' rows and 256 of the rows in order, and walks over the
// expert's rows, 64 at a time. One warpgroup loads: the tokens' rows by 16-byte copies of single
// threads, the others by the bulk copy engine. Two warpgroups of 64 columns each multiply.
#include <cuda_runtime.h>

#include "sm90_experts_launch.h"

namespace megatron_kanana {
namespace sm90 {
namespace {

constexpr int kStageRows = 64;
constexpr int kTokenColumns = 128;
constexpr int kRowColumns = 256;

struct WeightGradientArguments {
  CUtensorMap rows;  // [M, row_width], boxes of OpenRows<kStageRows>
  GatheredRows tokens;
  RowGroups groups;
  int row_width;
  float* gradient;
};

struct WeightGradientTile {
  static constexpr int kStages = 4;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kBytesA = kStageRows * kTokenColumns * 2;
  static constexpr int kBytesB = kStageRows * kRowColumns * 2;
  struct Shared {
    uint8_t a[kStages][kBytesA];  // [chunk][row][64 columns]
    uint8_t b[kStages][kBytesB];
    uint64_t full[kStages], empty[kStages];
  };
};
using Tile = WeightGradientTile;

// The tiles of this block, expert by expert.
struct Work {
  int expert, token_column, row_column;
  int first_row, end_row;

  __device__ static Work of(const WeightGradientArguments& arguments, int tile) {
    const int row_tiles = (arguments.row_width + kRowColumns - 1) / kRowColumns;
    const int token_tiles = (arguments.tokens.width + kTokenColumns - 1) / kTokenColumns;
    Work work;
    work.expert = tile / (row_tiles * token_tiles);
    const int within = tile % (row_tiles * token_tiles);
    work.row_column = within % row_tiles * kRowColumns;
    work.token_column = within / row_tiles * kTokenColumns;
    work.first_row = __shfl_sync(~0u, arguments.groups.begin(work.expert), 0);
    work.end_row = __shfl_sync(~0u, arguments.groups.end(work.expert), 0);
    return work;
  }

  static int count(const WeightGradientArguments& arguments) {
    const int row_tiles = (arguments.row_width + kRowColumns - 1) / kRowColumns;
    const int token_tiles = (arguments.tokens.width + kTokenColumns - 1) / kTokenColumns;
    return arguments.groups.experts * row_tiles * token_tiles;
  }
};

// By a warpgroup: a warp copies 16 of a stage's 64 rows, 16 threads the 256 bytes of one.
__device__ void load_rows(const WeightGradientArguments& arguments, Tile::Shared& shared,
                          int tiles) {
  constexpr int kRowsOfAWarp = kStageRows / 4;
  const int thread = threadIdx.x % kWarpgroup;
  const int warp = thread / kWarp, lane = thread % kWarp;
  const int part = lane % 16;  // 16 bytes of a row
  const uint32_t chunk_place = part / 8 * kStageRows * 128;
  const GatheredRows& tokens = arguments.tokens;
  Ring<Tile::kStages> ring;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Work work = Work::of(arguments, tile);
    const int column = work.token_column + part * 8;
    const bool inside = column < tokens.width;
    // A lane has the slot of one of the warp's rows, of kSteps stages. Loads take longer than a
    // few stages and are begun kSteps to 2 * kSteps stages before they are needed.
    constexpr int kSteps = kWarp / kRowsOfAWarp;
    const auto slot_of = [&](int step) {
      const int row = work.first_row + (step + lane / kRowsOfAWarp) * kStageRows +
                      warp * kRowsOfAWarp + lane % kRowsOfAWarp;
      return row < work.end_row ? tokens.slot(row) : 0;
    };
    int token = 0;
    int next = slot_of(0), after = slot_of(kSteps);
    const int steps = (work.end_row - work.first_row + kStageRows - 1) / kStageRows;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      if (step % kSteps == 0) {
        token = tokens.token(next);
        next = after;
        after = slot_of(step + 2 * kSteps);
      }
      const int first = work.first_row + step * kStageRows;
      const int valid_rows = min(kStageRows, work.end_row - first);
      barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      uint64_t* full = &shared.full[ring.stage];
      if (thread == 0) {
        barrier_expect(full, Tile::kBytesB);
#pragma unroll
        for (int chunk = 0; chunk < kRowColumns / kChunk; ++chunk) {
          OpenRows<kStageRows>::load(shared.b[ring.stage] + chunk * kStageRows * 128,
                                     &arguments.rows, full, work.row_column + chunk * kChunk, first,
                                     valid_rows);
        }
      }
      __syncwarp();
      const uint32_t a = shared_address(shared.a[ring.stage]) + chunk_place;
#pragma unroll
      for (int pair = 0; pair < kRowsOfAWarp / 2; ++pair) {
        const int within = 2 * pair + lane / 16;
        const int row = warp * kRowsOfAWarp + within;
        const int source = __shfl_sync(~0u, token, step % kSteps * kRowsOfAWarp + within);
        // The rows of other experts must not be summed: they are zero on both sides.
        copy_16_bytes(a + row * 128 + ((part % 8) ^ (row % 8)) * 16,
                      inside ? tokens.row(source) + column : tokens.data,
                      inside && row < valid_rows ? 16 : 0);
      }
      barrier_arrive_after_copies(full);
    }
  }
}

// Adds a warpgroup's sums, 64 columns of tokens x 256 of rows. kRowMajor: the gradient is
// [token columns, row columns], else [row columns, token columns].
template <bool kRowMajor>
__device__ __forceinline__ void add_sums(const WeightGradientArguments& arguments, const Work& work,
                                         int warpgroup, const float (&sums)[kRowColumns / 2]) {
  const int thread = threadIdx.x % kWarpgroup;
  const int width = arguments.tokens.width, row_width = arguments.row_width;
  float* gradient = arguments.gradient + int64_t(work.expert) * width * row_width;
  const int token_column =
      work.token_column + 64 * warpgroup + thread / kWarp * 16 + thread % kWarp / 4;
  const int row_column = work.row_column + 2 * (thread % 4);
  if (work.token_column + 64 * warpgroup >= width) return;  // widths are multiples of 64
#pragma unroll
  for (int i = 0; i < kRowColumns / 2; i += 4) {
    const int n = row_column + 2 * i;
    if (row_column - 2 * (thread % 4) + 2 * i >= row_width) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = token_column + 8 * half;
      if constexpr (kRowMajor) {
        add_two_floats(gradient + int64_t(m) * row_width + n, sums[i + 2 * half],
                       sums[i + 2 * half + 1]);
      } else {
        add_float(gradient + int64_t(n) * width + m, sums[i + 2 * half]);
        add_float(gradient + int64_t(n + 1) * width + m, sums[i + 2 * half + 1]);
      }
    }
  }
}

template <bool kRowMajor>
__device__ void multiply_rows(const WeightGradientArguments& arguments, Tile::Shared& shared,
                              int tiles, int warpgroup) {
  const bool leader = threadIdx.x % kWarpgroup == 0;
  Ring<Tile::kStages> ring;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Work work = Work::of(arguments, tile);
    const int steps = (work.end_row - work.first_row + kStageRows - 1) / kStageRows;
    if (steps == 0) continue;
    float sums[kRowColumns / 2];
    int released = ring.stage;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      fence_shared_for_async();  // threads' copies are ordinary writes
      const uint64_t a = descriptor<Swizzle::k128>(
          shared_address(shared.a[ring.stage] + warpgroup * kStageRows * 128), kStageRows * 128);
      const uint64_t b =
          descriptor<Swizzle::k128>(shared_address(shared.b[ring.stage]), kStageRows * 128);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStageRows / 16; ++k) {
        wgmma<true, true>(sums, advance(a, k * 16 * 128), advance(b, k * 16 * 128),
                          step > 0 || k > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) {
        if (leader) barrier_arrive(&shared.empty[released]);
        released = ring.stage;
      }
    }
    wgmma_wait<0>();
    hold(sums);
    if (leader) barrier_arrive(&shared.empty[released]);
    add_sums<kRowMajor>(arguments, work, warpgroup, sums);
  }
}

template <bool kRowMajor>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ WeightGradientArguments arguments, int tiles) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Tile::Shared*>(memory);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(&shared.full[stage], kWarpgroup + 1);
      barrier_init(&shared.empty[stage], 2);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<40>();
    load_rows(arguments, shared, tiles);
  } else {
    take_registers<232>();
    multiply_rows<kRowMajor>(arguments, shared, tiles, warpgroup - 1);
  }
}

template <bool kRowMajor>
void launch(const ExpertSizes& sizes, const ExpertRows& rows, const void* tokens,
            const void* in_order, int row_width, float* gradient, const char* name, void* stream) {
  if (sizes.rows == 0) return;
  enter_device();
  const WeightGradientArguments arguments{
      .rows = open_rows_map<kStageRows>(in_order, sizes.rows, row_width, row_width),
      .tokens = gathered_rows(sizes, rows, tokens),
      .groups = row_groups(sizes, rows),
      .row_width = row_width,
      .gradient = gradient,
  };
  const auto kernel = weight_gradient_kernel<kRowMajor>;
  constexpr int kSharedBytes = sizeof(Tile::Shared);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  kernel<<<multiprocessor_count(), Tile::kThreads, kSharedBytes,
           static_cast<cudaStream_t>(stream)>>>(arguments, Work::count(arguments));
  check_cuda(name);
}

}  // namespace
}  // namespace sm90

void experts_grad_down(const ExpertSizes& sizes, const ExpertRows& rows, const void* grad_out,
                       const void* weighted_activation, float* grad_down, void* stream) {
  sm90::launch<true>(sizes, rows, grad_out, weighted_activation, sizes.width, grad_down,
                     "experts_grad_down", stream);
}

void experts_grad_gate_up(const ExpertSizes& sizes, const ExpertRows& rows,
                          const void* grad_pre_activation, const void* hidden_states,
                          float* grad_gate_up, void* stream) {
  sm90::launch<false>(sizes, rows, hidden_states, grad_pre_activation, 2 * sizes.width,
                      grad_gate_up, "experts_grad_gate_up", stream);
}

}  // namespace megatron_kanana

// Gradients of the experts' weights, all experts in one launch: each expert's sum over its rows of
// an outer product of a token's row (gathered) with a row in order, added to fp32 numbers.
//
// A block holds 128 columns of the tokens' rows and 256 of the rows in order, and walks over the
// expert's rows, 64 at a time. One warpgroup loads: the tokens' rows by 16-byte copies of single
// threads, the others by the bulk copy engine. Two warpgroups multiply.
#include <cuda_runtime.h>

#include "sm90_added_pieces.cuh"
#include "sm90_experts_launch.h"

namespace megatron_kanana {
namespace sm90 {
namespace {

constexpr int kStageRows = 64;
constexpr int kTokenColumns = 128;
constexpr int kRowColumns = 256;

struct WeightGradientArguments {
  OpenRows<kStageRows> rows;  // [M, width]
  GatheredRows tokens;
  RowGroups groups;
  float* gradient;
};

struct WeightGradientTile {
  static constexpr int kStages = 4;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kTokenBytes = kStageRows * kTokenColumns * 2;
  static constexpr int kRowBytes = kStageRows * kRowColumns * 2;
  struct Shared {
    uint8_t tokens[kStages][kTokenBytes];  // [chunk][row][64 columns]
    uint8_t rows[kStages][kRowBytes];
    uint8_t staged[2][AddedPieces::kStagedBytes];
    uint64_t full[kStages], empty[kStages];
  };
};
using Tile = WeightGradientTile;

// The tiles of this block, expert by expert.
struct Work {
  int expert, token_column, row_column;
  int first_row, end_row;

  __device__ static Work of(const WeightGradientArguments& arguments, int tile) {
    const int row_tiles = (arguments.rows.width + kRowColumns - 1) / kRowColumns;
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
    const int row_tiles = (arguments.rows.width + kRowColumns - 1) / kRowColumns;
    const int token_tiles = (arguments.tokens.width + kTokenColumns - 1) / kTokenColumns;
    return arguments.groups.experts * row_tiles * token_tiles;
  }
};

// By a warpgroup: a warp copies 16 of a stage's 64 rows, eight threads the 128 bytes of a chunk.
__device__ void load_rows(const WeightGradientArguments& arguments, Tile::Shared& shared,
                          int tiles) {
  constexpr int kRowsOfAWarp = kStageRows / 4, kRowsAtOnce = kWarp / 8;
  constexpr int kRowsOfAThread = kRowsOfAWarp / kRowsAtOnce;
  const int thread = threadIdx.x % kWarpgroup;
  const int warp = thread / kWarp, lane = thread % kWarp;
  const int part = lane % 8, row_of_lane = lane / 8;  // 16 bytes of a row's chunk
  const GatheredRows& tokens = arguments.tokens;
  Ring<Tile::kStages> ring;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Work work = Work::of(arguments, tile);
    const int column = work.token_column + part * 8;
    const int chunks_inside = (tokens.width - work.token_column) / kChunk;
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
      const __nv_bfloat16* sources[kRowsOfAThread];
#pragma unroll
      for (int i = 0; i < kRowsOfAThread; ++i) {
        const int lane_of_row = step % kSteps * kRowsOfAWarp + i * kRowsAtOnce + row_of_lane;
        sources[i] = tokens.row(__shfl_sync(~0u, token, lane_of_row)) + column;
      }
      const int first = work.first_row + step * kStageRows;
      const int valid_rows = min(kStageRows, work.end_row - first);
      barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      uint64_t* full = &shared.full[ring.stage];
      if (thread == 0) {
        const int chunks = min(kRowColumns, arguments.rows.width - work.row_column) / kChunk;
        barrier_expect(full, chunks * kStageRows * kChunk * 2);
        for (int chunk = 0; chunk < chunks; ++chunk) {
          arguments.rows.load(shared.rows[ring.stage] + chunk * kStageRows * 128, full,
                              work.row_column + chunk * kChunk, first, valid_rows);
        }
      }
      __syncwarp();
      const uint32_t a =
          shared_address(shared.tokens[ring.stage]) + (warp * kRowsOfAWarp + row_of_lane) * 128;
#pragma unroll
      for (int chunk = 0; chunk < kTokenColumns / kChunk; ++chunk) {
        const bool inside = chunk < chunks_inside;
#pragma unroll
        for (int i = 0; i < kRowsOfAThread; ++i) {
          const int row = i * kRowsAtOnce + row_of_lane;
          // The rows of other experts must not be summed: they are zero on both sides.
          const bool counts = inside && warp * kRowsOfAWarp + row < valid_rows;
          copy_16_bytes(a + (chunk * kStageRows + i * kRowsAtOnce) * 128 + (part ^ (row % 8)) * 16,
                        sources[i] + (inside ? chunk * kChunk : 0), counts ? 16 : 0);
        }
      }
      barrier_arrive_after_copies(full);
    }
  }
}

// How two warpgroups share a tile. kTokensFirst: the gradient is [tokens' columns, columns of the
// rows in order], and a warpgroup has 64 x 256 of it. Else it is [columns of the rows in order,
// tokens' columns], and a warpgroup has two parts of 64 x 128.
template <bool kTokensFirst>
struct Share {
  static constexpr int kParts = kTokensFirst ? 1 : 2;
  static constexpr int kColumns = kTokensFirst ? kRowColumns : kTokenColumns;
  using Sums = float[kParts][kColumns / 2];
};

// Where the sums of a warpgroup belong.
template <bool kTokensFirst>
__device__ __forceinline__ AddedPieces pieces_of(const WeightGradientArguments& arguments,
                                                 const Work& work, int warpgroup, void* staged) {
  const int token_width = arguments.tokens.width, row_width = arguments.rows.width;
  const int width = kTokensFirst ? row_width : token_width;
  const int height = kTokensFirst ? token_width : row_width;
  const int first_row = kTokensFirst ? work.token_column : work.row_column;
  const int column = kTokensFirst ? work.row_column : work.token_column;
  const int row = first_row + warpgroup * Share<kTokensFirst>::kParts * 64;
  float* gradient = arguments.gradient + int64_t(work.expert) * height * width;
  return {gradient + int64_t(row) * width + column, width, height - row, width - column, staged};
}

template <bool kTokensFirst>
__device__ void multiply_rows(const WeightGradientArguments& arguments, Tile::Shared& shared,
                              int tiles, int warpgroup) {
  constexpr int kParts = Share<kTokensFirst>::kParts;
  constexpr int kChunkBytes = kStageRows * 128;
  const bool leader = threadIdx.x % kWarpgroup == 0;
  Ring<Tile::kStages> ring;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Work work = Work::of(arguments, tile);
    const int steps = (work.end_row - work.first_row + kStageRows - 1) / kStageRows;
    if (steps == 0) continue;
    const AddedPieces pieces =
        pieces_of<kTokensFirst>(arguments, work, warpgroup, shared.staged[warpgroup]);
    typename Share<kTokensFirst>::Sums sums;
    int released = ring.stage;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      fence_shared_for_async();  // threads' copies are ordinary writes
      const uint32_t tokens = shared_address(shared.tokens[ring.stage]);
      const uint32_t rows = shared_address(shared.rows[ring.stage]);
      const uint64_t a = descriptor<Swizzle::k128>(
          (kTokensFirst ? tokens : rows) + warpgroup * kParts * kChunkBytes, kChunkBytes);
      const uint64_t b = descriptor<Swizzle::k128>(kTokensFirst ? rows : tokens, kChunkBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStageRows / 16; ++k) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          wgmma<true, true>(sums[part], advance(a, part * kChunkBytes + k * 16 * 128),
                            advance(b, k * 16 * 128), step > 0 || k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) {
        if (leader) barrier_arrive(&shared.empty[released]);
        released = ring.stage;
      }
    }
    AddedPieces::Loaded loaded[2];
    pieces.load(0, 0, loaded[0]);
    wgmma_wait<0>();
#pragma unroll
    for (int part = 0; part < kParts; ++part) hold(sums[part]);
    if (leader) barrier_arrive(&shared.empty[released]);
    constexpr int kOfAPart = Share<kTokensFirst>::kColumns / 64, kPieces = kParts * kOfAPart;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int next = piece + 1;
      if (next < kPieces) pieces.load(next / kOfAPart, next % kOfAPart, loaded[next % 2]);
      pieces.add(piece / kOfAPart, piece % kOfAPart, sums[piece / kOfAPart], loaded[piece % 2]);
    }
  }
}

template <bool kTokensFirst>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ WeightGradientArguments arguments, int tiles) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Tile::Shared*>(memory);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  prepare_stages(shared.full, shared.empty, kWarpgroup + 1, 2);
  if (warpgroup == 0) {
    give_registers<40>();
    load_rows(arguments, shared, tiles);
  } else {
    take_registers<232>();
    multiply_rows<kTokensFirst>(arguments, shared, tiles, warpgroup - 1);
  }
}

template <bool kTokensFirst>
void launch(const ExpertSizes& sizes, const ExpertRows& rows, const void* tokens,
            const void* in_order, int row_width, float* gradient, const char* name, void* stream) {
  if (sizes.rows == 0) return;
  enter_device();
  const WeightGradientArguments arguments{
      .rows = open_rows<kStageRows>(in_order, sizes.rows, row_width, row_width),
      .tokens = gathered_rows(sizes, rows, tokens),
      .groups = row_groups(sizes, rows),
      .gradient = gradient,
  };
  const auto kernel = weight_gradient_kernel<kTokensFirst>;
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

// Products of each expert's rows with its weights in fp8, as sm90_row_matmul.cuh takes them in
// bf16.
//
// A stage holds 128 numbers of 8 bits where the other one holds 64 of 16, so that both load alike:
// tensors of 8 bits are described to the copy engine as bf16 ones of half the width, and `depth`
// counts pairs. After each 128 of the summed dimension, a block of the scales, the sums of the
// tensor cores are scaled and added to fp32 ones.
#pragma once

#include "fp8_quantization.cuh"
#include "sm90_row_matmul.cuh"

namespace megatron_kanana::sm90 {

constexpr int kScaledColumns = kScaleBlock;  // of a product, with one scale of the weights

struct Scales {
  const float* rows;     // [rows or tokens, blocks]
  const float* weights;  // of expert 0; see the strides
  int64_t expert_stride;
  int column_stride;  // from one block of the product's columns to the next
  int depth_stride;   // from one block of the summed dimension to the next
  int column_blocks;
  int blocks;  // of the summed dimension
  // Blocks of columns from a tile's first scaled part to its second.
  int second_part;
};

template <class Epilogue>
struct Fp8RowMatmulArguments : RowMatmulArguments<Epilogue> {
  Scales scales;
};

// Copies a stage's scales: of 128 rows, and of the weights for each part of a tile's columns. The
// multiplying warpgroups would wait for memory with each new block of the summed dimension.
template <class Epilogue>
class LoadedScales {
 public:
  static constexpr bool kCopied = true;
  static constexpr int kParts = Epilogue::kColumns / kScaledColumns;

  template <int kStages>
  struct Shared {
    float rows[kStages][kTileRows];
    float weights[kStages][kParts];
  };

  // `row`: where this thread's row of A lies.
  __device__ LoadedScales(const Fp8RowMatmulArguments<Epilogue>& arguments, const RowTile& tile,
                          int row)
      : depth_stride_(arguments.scales.depth_stride) {
    const Scales& scales = arguments.scales;
    row_ = scales.rows + int64_t(row) * scales.blocks;
    const int thread = threadIdx.x % kWarpgroup;
    if (thread < kParts) {
      const int first = tile.column_tile * Epilogue::kColumnStep / kScaledColumns;
      const int column = min(first + thread * scales.second_part, scales.column_blocks - 1);
      weights_ =
          scales.weights + tile.expert * scales.expert_stride + column * scales.column_stride;
    }
  }

  template <int kStages>
  __device__ __forceinline__ void copy(Shared<kStages>& shared, int stage, int block) const {
    const int thread = threadIdx.x % kWarpgroup;
    copy_4_bytes(shared_address(&shared.rows[stage][thread]), row_ + block);
    if (thread < kParts) {
      copy_4_bytes(shared_address(&shared.weights[stage][thread]),
                   weights_ + block * depth_stride_);
    }
  }

 private:
  const float *row_, *weights_ = nullptr;
  const int depth_stride_;
};

template <bool kGather_, int kStages_, class Epilogue_>
struct Fp8RowMatmul : RowMatmul<kGather_, false, kStages_, Epilogue_, LoadedScales<Epilogue_>> {
  using Arguments = Fp8RowMatmulArguments<Epilogue_>;
  static constexpr int kParts = LoadedScales<Epilogue_>::kParts;
};

// By a warpgroup, of 64 rows.
template <class Matmul>
__device__ void multiply_fp8_tiles(const typename Matmul::Arguments& arguments,
                                   typename Matmul::Shared& shared, int warpgroup) {
  using Epilogue = typename Matmul::Epilogue;
  constexpr int kParts = Matmul::kParts;
  const int steps = arguments.depth / kDepth;
  Ring<Matmul::kStages> ring;
  Epilogue epilogue(arguments.epilogue, shared.epilogue[warpgroup], warpgroup);
  const int row = 64 * warpgroup + accumulator_row();  // of the tile; and row + 8
  for (TileReader<Matmul> reader; reader.next(shared, ring);) {
    const RowTile& tile = reader.tile;
    const int first_row = tile.first_row + 64 * warpgroup;
    const int valid_rows = min(64, tile.end_row - first_row);
    if (valid_rows <= 0) {
      if constexpr (Epilogue::kLoadedStages > 0) epilogue.free_stages(shared.empty);
      for (int step = 0; step < steps + Epilogue::kLoadedStages; ++step, ring.advance()) {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        barrier_arrive(&shared.empty[ring.stage]);
      }
      if constexpr (Epilogue::kLoadedStages > 0) epilogue.skip();
      continue;
    }
    epilogue.begin(tile, first_row, valid_rows);
    float sums[Matmul::kColumns / 2];
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      const float* row_scales = shared.scales.rows[ring.stage] + row;
      const float* weight_scales = shared.scales.weights[ring.stage];
      // Threads' copies are ordinary writes, the tensor cores' reads are not.
      if constexpr (Matmul::kGather) fence_shared_for_async();
      const uint64_t a = descriptor<Swizzle::k128>(
          shared_address(shared.stages[ring.stage].a + warpgroup * 64 * 128));
      const uint64_t b = descriptor<Swizzle::k128>(shared_address(shared.stages[ring.stage].b));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float factors[2] = {row_scales[0] * weight_scales[part],
                                  row_scales[8] * weight_scales[part]};
        float partial[kScaledColumns / 2];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          wgmma_e4m3(partial, advance(a, k * 32), advance(b, part * kScaledColumns * 128 + k * 32),
                     k > 0);
        }
        wgmma_commit();
        if constexpr (Epilogue::kLoadedStages > 0) {
          if (step == 0 && part == 0) {
            epilogue.free_stages(shared.empty);
            epilogue.load_factors();
          }
        }
        wgmma_wait<0>();
        hold(partial);
        if (part == kParts - 1) barrier_arrive(&shared.empty[ring.stage]);
#pragma unroll
        for (int i = 0; i < kScaledColumns / 2; ++i) {
          sums[part * kScaledColumns / 2 + i] += partial[i] * factors[i / 2 % 2];
        }
      }
    }
    if constexpr (Epilogue::kLoadedStages > 0) {
      epilogue.finish(sums, tile, first_row, valid_rows, shared, ring);
    } else {
      epilogue.finish(sums, tile, first_row, valid_rows);
    }
  }
  epilogue.end();
}

template <class Matmul>
__global__ void __launch_bounds__(Matmul::kThreads, 1)
    fp8_row_matmul_kernel(const __grid_constant__ typename Matmul::Arguments arguments) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Matmul::Shared*>(memory);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  prepare_row_matmul<Matmul>(shared);
  if (warpgroup == 0) {
    give_registers<40>();
    load_row_matmul<Matmul>(arguments, shared);
  } else {
    take_registers<232>();
    multiply_fp8_tiles<Matmul>(arguments, shared, warpgroup - 1);
  }
}

}  // namespace megatron_kanana::sm90

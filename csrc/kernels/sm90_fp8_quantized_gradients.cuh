// Gradients of the experts' pre-activation in 8 bits, as the gradient of their inputs takes them.
#pragma once

#include "sm90_experts_down_backward.cuh"
#include "sm90_fp8_staged_rows.cuh"

namespace megatron_kanana::sm90 {

// Gradients of gate and up of 128 columns, each row's with a scale of its own.
class QuantizedGradients : public BesideBf16 {
 public:
  struct Arguments {
    StoredRows gate, up;
    float* scales;  // [rows, 2 * blocks], those of up behind those of gate
    int blocks;
  };
  struct Shared {
    uint8_t staged[2][kStagedBytes];
  };

  __device__ QuantizedGradients(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments), shared_(shared), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void note(int half, float2 gate, float2 up) {
    largest_gate_[half] = fmaxf(largest_gate_[half], fmaxf(fabsf(gate.x), fabsf(gate.y)));
    largest_up_[half] = fmaxf(largest_up_[half], fmaxf(fabsf(up.x), fabsf(up.y)));
  }

  // The tiles lie in shared memory, on their way to memory. Those of the last tile have left, for
  // the warpgroup has freed its stages since.
  template <int kPieces>
  __device__ __forceinline__ void finish(uint8_t* const (&places)[kPieces][2], const RowTile& tile,
                                         int first_row, int valid_rows) {
    static_assert(kPieces * kChunk == kScaleBlock);
    const bool leader = threadIdx.x % kWarpgroup == 0;
    const int stride = 2 * arguments_.blocks;
    float* scales = arguments_.scales + int64_t(first_row) * stride + tile.column_tile;
    float inverses[2];
    find_scales(largest_gate_, inverses, scales, stride, valid_rows);
    quantize<0>(places, inverses);
    find_scales(largest_up_, inverses, scales + arguments_.blocks, stride, valid_rows);
    quantize<1>(places, inverses);
    fence_shared_for_async();
    named_sync(1 + warpgroup_, kWarpgroup);
    if (leader) {
      const int column = tile.column_tile * kScaleBlock / 2;
      arguments_.gate.store(shared_.staged[0], column, first_row, valid_rows);
      arguments_.up.store(shared_.staged[1], column, first_row, valid_rows);
      bulk_commit();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) largest_gate_[half] = largest_up_[half] = 0.0f;
  }

 private:
  template <int kWhich, int kPieces>
  __device__ __forceinline__ void quantize(uint8_t* const (&places)[kPieces][2],
                                           const float (&inverses)[2]) {
    const uint32_t staged = shared_address(shared_.staged[kWhich]);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const uint32_t tile = shared_address(places[piece][kWhich]);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        uint32_t values[4];
        load_matrices(tile + part_address(0, part), values[0], values[1], values[2], values[3]);
        stage_quantized(staged, piece * 4 + part, values, inverses);
      }
    }
  }

  const Arguments& arguments_;
  Shared& shared_;
  const int warpgroup_;
  float largest_gate_[2] = {0.0f, 0.0f}, largest_up_[2] = {0.0f, 0.0f};
};

}  // namespace megatron_kanana::sm90

// Gradients of the experts' pre-activation and the activation in 8 bits, as the gradients of
// weights take them, beside the gradients' rows.
#pragma once

#include "sm90_fp8_column_tiles.cuh"
#include "sm90_fp8_quantized_gradients.cuh"

namespace megatron_kanana::sm90 {

struct StoredColumns {
  static constexpr int kBlockBytes = kScaleBlock * kColumnTileRows;

  uint8_t* data;  // [tiles, width, 64]
  float* scales;  // [tiles, width / 128]
  int width;

  // 128 columns of a tile, by one thread.
  __device__ __forceinline__ void store(const void* staged, int tile, int block,
                                        float scale) const {
    const int64_t column = int64_t(tile) * width + block * kScaleBlock;
    store_bytes(data + column * kColumnTileRows, staged, kBlockBytes);
    scales[column / kScaleBlock] = scale;
  }
};

// Quantises gradients, each row times the scale of the hidden states' row that it is to meet, and
// activations times that of the gradient of the output's. Both warpgroups' tiles have the scale of
// the larger one, for products of 128 rows take less time than of 64: they tell each other.
class GradientColumns {
 public:
  static constexpr bool kStores = true;
  struct Arguments {
    QuantizedGradients::Arguments rows;
    StoredColumns gradient, activation;
    const float *hidden_states_scales, *grad_out_scales;  // [tokens, scales_of_a_token]
    int scales_of_a_token, slots_of_a_token;
    RowGroups groups;
  };
  enum Which { kGate, kUp, kActivation, kCount };
  struct alignas(1024) Shared {
    uint8_t columns[kCount][StoredColumns::kBlockBytes];
    uint32_t largest[2][kWarpgroup / kWarp][kCount];  // of every other tile; bits of fp32
  };

  __device__ GradientColumns(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments),
        shared_(shared),
        other_(warpgroup == 0 ? (&shared)[1] : (&shared)[-1]),
        warpgroup_(warpgroup) {}

  // `slot`: that of a thread's upper row, or with `half` of its lower one.
  __device__ __forceinline__ void load_factors(int half, int slot) {
    const int64_t place =
        int64_t(slot / arguments_.slots_of_a_token) * arguments_.scales_of_a_token;
    gradient_factors_[half] = __ldg(arguments_.hidden_states_scales + place);
    activation_factors_[half] = __ldg(arguments_.grad_out_scales + place);
  }

  __device__ __forceinline__ float gradient_factor(int half) const {
    return gradient_factors_[half];
  }
  __device__ __forceinline__ float activation_factor(int half) const {
    return activation_factors_[half];
  }
  __device__ __forceinline__ void note(int half, float2 gate, float2 up) {
    note_of(kGate, half, gate.x, gate.y);
    note_of(kUp, half, up.x, up.y);
  }
  __device__ __forceinline__ void note_activation(int half, float a, float b) {
    note_of(kActivation, half, a, b);
  }

  // A tile without rows of this warpgroup.
  __device__ __forceinline__ void skip() {
    inside_ = 0;
    float scales[kCount];
    find_tile_scales(scales);
  }

  // Rows of other experts come to zero in the columns, and are left out of the rows. Both tiles in
  // shared memory have left since they were written for the last tile, for the warpgroup has freed
  // its stages.
  template <int kPieces>
  __device__ __forceinline__ void finish(uint8_t* const (&places)[kPieces][2],
                                         const uint32_t (&activations)[kPieces][4][4],
                                         const RowTile& tile, int first_row, int valid_rows) {
    static_assert(kPieces * kChunk == kScaleBlock);
    const int row = accumulator_row();
    inside_ = (row < valid_rows ? 0x00FF00FF : 0) | (row + 8 < valid_rows ? 0xFF00FF00 : 0);
    float scales[kCount];
    find_tile_scales(scales);
    const int stride = 2 * arguments_.rows.blocks;
    float* const of_rows = arguments_.rows.scales + int64_t(first_row) * stride + tile.column_tile;
    const float factors[2] = {inverse_of(gradient_factors_[0]), inverse_of(gradient_factors_[1])};
    float inverses[2];
    find_scales(largest_[kGate], inverses, of_rows, stride, valid_rows, factors);
    quantize_gradients<kGate>(places, inverses, inverse_of(scales[kGate]));
    find_scales(largest_[kUp], inverses, of_rows + arguments_.rows.blocks, stride, valid_rows,
                factors);
    quantize_gradients<kUp>(places, inverses, inverse_of(scales[kUp]));
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      stage_columns_of(kActivation, piece, activations[piece], inverse_of(scales[kActivation]));
    }
    fence_shared_for_async();
    named_sync(1 + warpgroup_, kWarpgroup);
    if (threadIdx.x % kWarpgroup == 0) {
      const int block = tile.column_tile, blocks = arguments_.rows.blocks;
      arguments_.rows.gate.store(places[0][kGate], block * kScaleBlock / 2, first_row, valid_rows);
      arguments_.rows.up.store(places[0][kUp], block * kScaleBlock / 2, first_row, valid_rows);
      const int begin = arguments_.groups.begin(tile.expert);
      const int column_tile =
          first_column_tile(begin, tile.expert) + (first_row - begin) / kColumnTileRows;
      const auto& columns = shared_.columns;
      arguments_.gradient.store(columns[kGate], column_tile, block, scales[kGate]);
      arguments_.gradient.store(columns[kUp], column_tile, blocks + block, scales[kUp]);
      arguments_.activation.store(columns[kActivation], column_tile, block, scales[kActivation]);
      bulk_commit();
    }
#pragma unroll
    for (auto& largest : largest_) largest[0] = largest[1] = 0.0f;
  }

 private:
  __device__ __forceinline__ void note_of(Which which, int half, float a, float b) {
    largest_[which][half] = fmaxf(largest_[which][half], fmaxf(fabsf(a), fabsf(b)));
  }

  // Of both warpgroups' rows, which synchronise. A warpgroup may come to the next tile before the
  // other one has left this one, but not to the one after that, so that two turns are enough.
  __device__ __forceinline__ void find_tile_scales(float (&scales)[kCount]) {
    constexpr int kFirstBarrier = 3;
    const int warp = threadIdx.x % kWarpgroup / kWarp;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float upper = inside_ & 0x000000FF ? largest_[i][0] : 0.0f;
      const float lower = inside_ & 0x0000FF00 ? largest_[i][1] : 0.0f;
      // Numbers that are not negative are in the order of their bits.
      const uint32_t largest = __reduce_max_sync(~0u, __float_as_uint(fmaxf(upper, lower)));
      if (threadIdx.x % kWarp == 0) shared_.largest[turn_][warp][i] = largest;
    }
    named_arrive(kFirstBarrier + 2 * turn_ + 1 - warpgroup_, 2 * kWarpgroup);
    named_sync(kFirstBarrier + 2 * turn_ + warpgroup_, 2 * kWarpgroup);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      uint32_t largest = 0;
#pragma unroll
      for (int of_warp = 0; of_warp < kWarpgroup / kWarp; ++of_warp) {
        largest = max(largest,
                      max(shared_.largest[turn_][of_warp][i], other_.largest[turn_][of_warp][i]));
      }
      scales[i] = scale_of(__uint_as_float(largest));
    }
    turn_ ^= 1;
  }

  // The rows take the place of the first piece, of which a warp has read its own before.
  template <int kWhich, int kPieces>
  __device__ __forceinline__ void quantize_gradients(uint8_t* const (&places)[kPieces][2],
                                                     const float (&of_rows)[2], float of_tile) {
    const uint32_t rows = shared_address(places[0][kWhich]);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const uint32_t tile = shared_address(places[piece][kWhich]);
      uint32_t values[4][4];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        load_matrices(tile + part_address(0, part), values[part][0], values[part][1],
                      values[part][2], values[part][3]);
      }
      __syncwarp();
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        stage_quantized(rows, piece * 4 + part, values[part], of_rows);
      }
      stage_columns_of(Which(kWhich), piece, values, of_tile);
    }
  }

  // 64 columns of bf16 in the order of an accumulator. Of a column a thread has two rows, two bytes
  // that lie side by side in it, so that columns are rows of a transposed matrix of such pairs.
  __device__ __forceinline__ void stage_columns_of(Which which, int piece,
                                                   const uint32_t (&values)[4][4],
                                                   float inverse) const {
    const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
    const uint32_t tile = shared_address(shared_.columns[which]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pairs[4];  // of eight columns each
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& of_part = values[half * 2 + i / 2];
        const float2 upper = unpack_bf16(of_part[i % 2 * 2]);
        const float2 lower = unpack_bf16(of_part[i % 2 * 2 + 1]);
        pairs[i] =
            pack_e4m3(upper.x * inverse, lower.x * inverse, upper.y * inverse, lower.y * inverse) &
            inside_;
      }
      const int column = piece * kChunk + half * kWarp + lane;
      store_transposed_matrices(column_address(tile, column, warp), pairs[0], pairs[1], pairs[2],
                                pairs[3]);
    }
  }

  const Arguments& arguments_;
  Shared &shared_, &other_;
  const int warpgroup_;
  float gradient_factors_[2], activation_factors_[2];
  float largest_[kCount][2] = {};  // of a thread's two rows
  uint32_t inside_;  // the bytes of those that are the expert's, as stage_columns_of has them
  int turn_ = 0;
};

}  // namespace megatron_kanana::sm90

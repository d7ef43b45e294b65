// Backward through the experts' down projection and activation: what is made of a tile of the
// product of gathered rows of grad_out and down. Gradients of the pre-activation, the activation
// once more for the weights' gradients, and the gradient of each row's weight, <grad_out
// down[expert], activation> (SonicMoE, arXiv:2512.14080).
#pragma once

#include "sm90_row_matmul.cuh"
#include "sm90_staged_rows.cuh"
#include "swiglu.cuh"

namespace megatron_kanana::sm90 {

// A quantisation of gradients and activation that changes neither of them, and that takes no part
// in how they are stored.
struct BesideBf16 {
  static constexpr bool kStores = false;
  __device__ __forceinline__ void load_factors(int, int) {}
  __device__ __forceinline__ void skip() {}
  __device__ __forceinline__ float gradient_factor(int) const { return 1.0f; }
  __device__ __forceinline__ float activation_factor(int) const { return 1.0f; }
  __device__ __forceinline__ void note_activation(int, float, float) {}
};

// What follows the gradients of a tile's pre-activation where nothing does.
struct NoQuantization : BesideBf16 {
  struct Arguments {};
  struct Shared {};
  __device__ NoQuantization(const Arguments&, Shared&, int) {}
  __device__ __forceinline__ void note(int, float2, float2) {}
  template <int kPieces>
  __device__ __forceinline__ void finish(uint8_t* const (&)[kPieces][2], const RowTile&, int, int) {
  }
};

// A pre-activation in bf16, of which a stage holds 64 columns. Its gradients take its place.
class Bf16PreActivation {
 public:
  struct Arguments {
    CUtensorMap gate, up;
  };
  static constexpr int kLoadedColumns = kChunk;

  __device__ __forceinline__ void begin(const Arguments&, int, int, int) {}
  // Before the first gradient is written; by a warpgroup, whose named barrier comes last.
  __device__ __forceinline__ void take(uint8_t* const (&)[2], int) {}

  // 16 columns of a tile of 64: two of a thread's each, of its upper and its lower row in turns.
  struct Pairs {
    float2 gate[4], up[4];
  };
  __device__ __forceinline__ Pairs read(uint32_t gates, uint32_t ups, int, int part) const {
    const uint32_t offset = part_address(0, part);
    uint32_t gate[4], up[4];
    load_matrices(gates + offset, gate[0], gate[1], gate[2], gate[3]);
    load_matrices(ups + offset, up[0], up[1], up[2], up[3]);
    Pairs pairs;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs.gate[i] = unpack_bf16(gate[i]);
      pairs.up[i] = unpack_bf16(up[i]);
    }
    return pairs;
  }
};

// kColumns_: of a tile. Quantization: sees the gradients, and then their tiles in shared memory;
// with kStores it writes them and the activation itself, each times a factor of its row.
// PreActivation: how it is kept.
template <int kColumns_, class Quantization, class PreActivation = Bf16PreActivation>
class DownBackward {
 public:
  static constexpr int kColumns = kColumns_;
  static constexpr int kColumnStep = kColumns;
  static constexpr int kPieces = kColumns / kChunk;

  struct Arguments {
    typename PreActivation::Arguments pre_activation;
    StoredRows grad_gate, grad_up, activation;
    const float* weights;
    const int32_t* slot_of_row;
    float* grad_weight_parts;
    int column_tiles;
    typename Quantization::Arguments quantization;
  };
  // What the loader fills a stage with: of each warpgroup's rows, gate and up, 128 bytes of each
  // row. Gradients of 64 columns then take the place of each, in stages that nothing is loaded to
  // as well.
  struct Piece {
    uint8_t halves[2][2][kStagedBytes];
  };
  static constexpr int kLoadedStages = kPieces;
  using Shared = typename Quantization::Shared;

  __device__ static void load(const Arguments& arguments, void* stage, uint64_t* full,
                              const RowTile& tile, int piece) {
    constexpr int kLoaded = kColumns / PreActivation::kLoadedColumns;
    if (piece >= kLoaded) {
      barrier_arrive(full);
      return;
    }
    auto& halves = static_cast<Piece*>(stage)->halves;
    const int column = (tile.column_tile * kLoaded + piece) * kChunk;
    barrier_expect(full, sizeof(Piece));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows of other experts are loaded too, and come to nothing.
      const int row = tile.first_row + half * kStoredRows;
      load_box(halves[half][0], &arguments.pre_activation.gate, full, column, row, 0);
      load_box(halves[half][1], &arguments.pre_activation.up, full, column, row, 0);
    }
  }

  __device__ DownBackward(const Arguments& arguments, Shared& shared, int warpgroup)
      : arguments_(arguments),
        warpgroup_(warpgroup),
        quantization_(arguments.quantization, shared, warpgroup) {}

  __device__ __forceinline__ void begin(const RowTile& tile, int first_row, int valid_rows) {
    pre_activation_.begin(arguments_.pre_activation, tile.column_tile, first_row, valid_rows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + min(accumulator_row() + 8 * half, valid_rows - 1);
      slots_[half] = arguments_.slot_of_row == nullptr ? row : __ldg(arguments_.slot_of_row + row);
    }
  }

  // Once the first products are under way, for it waits for the slots.
  __device__ __forceinline__ void load_factors() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (arguments_.weights != nullptr) weights_[half] = __ldg(arguments_.weights + slots_[half]);
      quantization_.load_factors(half, slots_[half]);
    }
  }

  // A tile without rows of this warpgroup.
  __device__ __forceinline__ void skip() { quantization_.skip(); }

  template <class MatmulShared, class StageRing>
  __device__ __forceinline__ void finish(const float (&sums)[kColumns / 2], const RowTile& tile,
                                         int first_row, int valid_rows, MatmulShared& shared,
                                         StageRing& ring) {
    const bool leader = threadIdx.x % kWarpgroup == 0;
    const int column = tile.column_tile * kColumns;
    float products[2] = {0.0f, 0.0f};
    uint32_t activations[kPieces][4][4];
    uint8_t* places[kPieces][2];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece, ring.advance()) {
      auto& halves = reinterpret_cast<Piece*>(&shared.stages[ring.stage])->halves;
      places[piece][0] = halves[warpgroup_][0];
      places[piece][1] = halves[warpgroup_][1];
      stages_[piece] = ring.stage;
      barrier_wait(&shared.full[ring.stage], ring.parity);
      if (piece == 0) pre_activation_.take(places[0], 1 + warpgroup_);
      differentiate(sums, piece, places[piece], activations[piece], products);
      if constexpr (Quantization::kStores) continue;
      fence_shared_for_async();
      named_sync(1 + warpgroup_, kWarpgroup);
      if (leader) {
        arguments_.grad_gate.store(places[piece][0], column + piece * kChunk, first_row,
                                   valid_rows);
        arguments_.grad_up.store(places[piece][1], column + piece * kChunk, first_row, valid_rows);
        bulk_commit();
      }
    }
    store_grad_weights(products, tile, first_row, valid_rows);
    if constexpr (Quantization::kStores) {
      quantization_.finish(places, activations, tile, first_row, valid_rows);
    } else {
      quantization_.finish(places, tile, first_row, valid_rows);
      store_activations(places, activations, column, first_row, valid_rows);
    }
    holds_ = true;
  }

  // The stages of the tile before, once they are stored.
  __device__ __forceinline__ void free_stages(uint64_t* empty) {
    if (threadIdx.x % kWarpgroup == 0 && holds_) {
      bulk_wait_read();
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        barrier_arrive(&empty[stages_[piece]], kWarpgroup);
      }
    }
    holds_ = false;
  }

  __device__ __forceinline__ void end() {
    if (threadIdx.x % kWarpgroup == 0) bulk_wait();
  }

 private:
  __device__ __forceinline__ void differentiate(const float (&sums)[kColumns / 2], int piece,
                                                uint8_t* const (&places)[2],
                                                uint32_t (&activations)[4][4],
                                                float (&products)[2]) {
    const uint32_t gates = shared_address(places[0]);
    const uint32_t ups = shared_address(places[1]);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const auto pairs = pre_activation_.read(gates, ups, piece, part);
      uint32_t gate[4], up[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i % 2;  // registers of the upper and the lower row alternate
        const float weight = weights_[half];
        const float2 g = pairs.gate[i], u = pairs.up[i];
        const float first = sums[piece * 32 + part * 8 + 2 * i];
        const float second = sums[piece * 32 + part * 8 + 2 * i + 1];
        const float factor = weight * quantization_.gradient_factor(half);
        const auto x = SwigluGradient::of(g.x, u.x, factor * first);
        const auto y = SwigluGradient::of(g.y, u.y, factor * second);
        products[half] += first * x.activation + second * y.activation;
        gate[i] = pack_bf16(x.grad_gate, y.grad_gate);
        up[i] = pack_bf16(x.grad_up, y.grad_up);
        quantization_.note(half, {x.grad_gate, y.grad_gate}, {x.grad_up, y.grad_up});
        const float of_activation = weight * quantization_.activation_factor(half);
        const float a = of_activation * x.activation, b = of_activation * y.activation;
        quantization_.note_activation(half, a, b);
        activations[part][i] = pack_bf16(a, b);
      }
      const uint32_t offset = part_address(0, part);
      store_matrices(gates + offset, gate[0], gate[1], gate[2], gate[3]);
      store_matrices(ups + offset, up[0], up[1], up[2], up[3]);
    }
  }

  // Where the gradients of the first pieces lay, once they are no longer needed.
  __device__ __forceinline__ void store_activations(uint8_t* const (&places)[kPieces][2],
                                                    const uint32_t (&activations)[kPieces][4][4],
                                                    int column, int first_row, int valid_rows) {
    static_assert(kPieces <= 4);
    const bool leader = threadIdx.x % kWarpgroup == 0;
    if (leader) bulk_wait_read<1>();
    named_sync(1 + warpgroup_, kWarpgroup);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      stage_tile(shared_address(places[piece / 2][piece % 2]), activations[piece]);
    }
    fence_shared_for_async();
    named_sync(1 + warpgroup_, kWarpgroup);
    if (leader) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        arguments_.activation.store(places[piece / 2][piece % 2], column + piece * kChunk,
                                    first_row, valid_rows);
      }
      bulk_commit();
    }
  }

  __device__ __forceinline__ void store_grad_weights(float (&products)[2], const RowTile& tile,
                                                     int first_row, int valid_rows) {
    if (arguments_.grad_weight_parts == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = products[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int row = accumulator_row() + 8 * half;
      if (threadIdx.x % 4 == 0 && row < valid_rows) {
        arguments_.grad_weight_parts[int64_t(first_row + row) * arguments_.column_tiles +
                                     tile.column_tile] = sum;
      }
    }
  }

  const Arguments& arguments_;
  const int warpgroup_;
  Quantization quantization_;
  PreActivation pre_activation_;
  bool holds_ = false;
  int stages_[kPieces];
  int slots_[2];  // of a thread's two rows
  float weights_[2] = {1.0f, 1.0f};
};

}  // namespace megatron_kanana::sm90

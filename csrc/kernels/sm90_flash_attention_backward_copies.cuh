// The backward's work, its shared memory, and the warps that bring data in and out of it.
#pragma once

#include "sm90_attention_mask.cuh"
#include "sm90_attention_tiles.cuh"

namespace megatron_kanana::sm90 {

constexpr int kBackwardThreads = 3 * kWarpgroup;

struct BackwardArguments {
  CUtensorMap query, key, value, grad_out, grad_key, grad_value;
  // [batch, heads, padded sequence]: logsumexp in powers of two, or infinity where a query sees
  // nothing; sum of grad_out times out.
  const float* logsumexp_log2;
  const float* out_dot_grad;
  float*
      grad_query;  // fp32 [batch, heads, tiles, 2, kPartFloats] as `backward_finish_kernel` has it
  // Where sums have a fixed order, else null; zeroed. One more than the row of keys that was added
  // last to a part of grad_query, [batch, heads, tiles, 2]; the number of blocks begun.
  int32_t* finished;
  int32_t* next_block;
  const int32_t* documents;
  int sequence, batch, heads;
  int queries_of_a_key;
  HeadGroups order;
  float softmax_scale;
  bool causal;
};

template <int kWidth_, int kValueWidth_>
struct BackwardTile {
  static constexpr int kWidth = kWidth_;
  static constexpr int kValueWidth = kValueWidth_;
  static constexpr int kQueries = 64;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = kQueries * kWidth * 2;
  static constexpr int kGradOutBytes = kQueries * kValueWidth * 2;
  static constexpr int kKeyBytes = kKeys * kWidth * 2;
  static constexpr int kValueBytes = kKeys * kValueWidth * 2;
  static constexpr int kPartFloats = kQueries * kWidth / 2;  // of dQ, by one warpgroup

  struct Shared {
    uint8_t key[kKeyBytes];      // [chunk of 32][row]; at the end dK, a warpgroup after the other
    uint8_t value[kValueBytes];  // [chunk of 64][row]; at the end dV
    uint8_t query[kStages][kQueryBytes];
    uint8_t grad_out[kStages][kGradOutBytes];
    uint8_t grad_scores[kKeys * kQueries * 2];  // dS^T
    float grad_query[2][kPartFloats];
    alignas(16) float logsumexp_log2[kStages][kQueries];
    alignas(16) float out_dot_grad[kStages][kQueries];
    uint64_t key_full, value_full;
    uint64_t query_full[kStages], query_empty[kStages];
    uint64_t grad_out_full[kStages], grad_out_empty[kStages];
    int block;
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= 227 * 1024);
};

// Named barriers; 0 is that of the whole block.
enum BackwardBarrier {
  kGradScoresWritten = 1,  // by both warpgroups
  kGradScoresFree = 2,     // + the writer: the other warpgroup has used its rows
  kGradQueryFull = 4,      // + warpgroup
  kGradQueryEmpty = 6,     // + warpgroup
  kAllGradQuery = 8,       // both warpgroups have used the keys
};

// The keys and the query heads of one block.
struct BackwardWork {
  int first_key;
  int key_head;
  int sample;

  template <class Tile>
  __device__ static BackwardWork of(const BackwardArguments& arguments, int block) {
    const int key_heads = arguments.heads / arguments.queries_of_a_key;
    const auto place = arguments.order.of(block);
    // Where the order of sums is fixed, blocks wait for those with later keys; else the first
    // keys, which most queries see, come first.
    const int row =
        arguments.next_block != nullptr ? arguments.order.rows - 1 - place.row : place.row;
    return {row * Tile::kKeys, place.head % key_heads, place.head / key_heads};
  }
};

template <class Tile>
__device__ __forceinline__ int64_t query_tile_index(const BackwardArguments& arguments, int sample,
                                                    int head, int tile) {
  const int tiles = (arguments.sequence + Tile::kQueries - 1) / Tile::kQueries;
  return (int64_t(sample) * arguments.heads + head) * tiles + tile;
}

// Tiles of queries that see keys of a block: at least one, if only to see nothing.
template <class Tile>
__device__ Run query_tiles_of(const AttentionMask& mask, int first_key) {
  Run tiles = mask.query_tiles<Tile::kKeys, Tile::kQueries>(first_key);
  tiles.end = max(tiles.begin + 1, tiles.end);
  return tiles;
}

template <class Tile>
__device__ void load_backward(const BackwardArguments& arguments, const BackwardWork& work,
                              Run tiles, typename Tile::Shared& shared) {
  barrier_expect(&shared.key_full, Tile::kKeyBytes);
#pragma unroll
  for (int chunk = 0; chunk < Tile::kWidth / 32; ++chunk) {
    load_box(shared.key + chunk * Tile::kKeys * 64, &arguments.key, &shared.key_full, chunk * 32,
             work.first_key, work.key_head, work.sample);
  }
  Ring<Tile::kStages> ring;
  bool first = true;
  for (int i = 0; i < arguments.queries_of_a_key; ++i) {
    const int head = work.key_head * arguments.queries_of_a_key + i;
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      const int row = tile * Tile::kQueries;
      const int64_t numbers =
          query_tile_index<Tile>(arguments, work.sample, head, tile) * Tile::kQueries;
      constexpr int kNumbersBytes = Tile::kQueries * sizeof(float);
      barrier_wait(&shared.query_empty[ring.stage], ring.parity ^ 1);
      uint64_t* full = &shared.query_full[ring.stage];
      barrier_expect(full, Tile::kQueryBytes + 2 * kNumbersBytes);
#pragma unroll
      for (int chunk = 0; chunk < Tile::kWidth / 64; ++chunk) {
        load_box(shared.query[ring.stage] + chunk * Tile::kQueries * 128, &arguments.query, full,
                 chunk * 64, row, head, work.sample);
      }
      load_bytes(shared.logsumexp_log2[ring.stage], arguments.logsumexp_log2 + numbers,
                 kNumbersBytes, full);
      load_bytes(shared.out_dot_grad[ring.stage], arguments.out_dot_grad + numbers, kNumbersBytes,
                 full);
      if (first) {
        first = false;
        barrier_expect(&shared.value_full, Tile::kValueBytes);
#pragma unroll
        for (int chunk = 0; chunk < Tile::kValueWidth / 64; ++chunk) {
          load_box(shared.value + chunk * Tile::kKeys * 128, &arguments.value, &shared.value_full,
                   chunk * 64, work.first_key, work.key_head, work.sample);
        }
      }
      barrier_wait(&shared.grad_out_empty[ring.stage], ring.parity ^ 1);
      full = &shared.grad_out_full[ring.stage];
      barrier_expect(full, Tile::kGradOutBytes);
#pragma unroll
      for (int chunk = 0; chunk < Tile::kValueWidth / 64; ++chunk) {
        load_box(shared.grad_out[ring.stage] + chunk * Tile::kQueries * 128, &arguments.grad_out,
                 full, chunk * 64, row, head, work.sample);
      }
      ring.advance();
    }
  }
}

// A warp for each warpgroup: adds its parts of dQ to the sums in global memory. Where the order is
// fixed, the block with the next later keys comes first.
template <class Tile>
__device__ void add_grad_query(const BackwardArguments& arguments, const BackwardWork& work,
                               Run tiles, int half, typename Tile::Shared& shared) {
  constexpr int kBytes = Tile::kPartFloats * sizeof(float);
  const AttentionMask mask(arguments.sequence, arguments.batch, work.sample, arguments.causal,
                           arguments.documents);
  const int row = work.first_key / Tile::kKeys;
  Run later{0, 0};
  if (work.first_key + Tile::kKeys < arguments.sequence) {
    later = query_tiles_of<Tile>(mask, work.first_key + Tile::kKeys);
  }
  for (int i = 0; i < arguments.queries_of_a_key; ++i) {
    const int head = work.key_head * arguments.queries_of_a_key + i;
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      const int64_t part = query_tile_index<Tile>(arguments, work.sample, head, tile) * 2 + half;
      volatile int32_t* finished =
          arguments.finished == nullptr ? nullptr : arguments.finished + part;
      named_sync(kGradQueryFull + half, kWarpgroup + kWarp);
      if (threadIdx.x % kWarp == 0) {
        if (finished != nullptr && tile >= later.begin && tile < later.end) {
          while (*finished != row + 2) __nanosleep(32);
          __threadfence();
        }
        add_floats(arguments.grad_query + part * Tile::kPartFloats, shared.grad_query[half],
                   kBytes);
        bulk_commit();
        if (finished != nullptr) {
          bulk_wait();
          __threadfence();
          *finished = row + 1;
        } else {
          bulk_wait_read();
        }
      }
      __syncwarp();
      named_arrive(kGradQueryEmpty + half, kWarpgroup + kWarp);
    }
  }
  if (threadIdx.x % kWarp == 0) bulk_wait();
}

}  // namespace megatron_kanana::sm90

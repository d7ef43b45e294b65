// FlashAttention forward for Hopper that also finds each head's largest logit.
//
// A block holds 128 queries of a head and walks over the keys they see, 128 at a time, from the
// last to the first. One warp loads (TMA); two warpgroups of 64 queries each multiply (wgmma) and
// take the softmax. A warpgroup's softmax of one step runs beside its product with the values of
// the step before (FlashAttention-3, arXiv:2407.08608, section 3.2), and beside the products of
// the other. Blocks are persistent and take tiles, the long ones first, from a counter.
//
// The running maximum is the true one at every step: it is what QK-Clip needs.
#pragma once

#include "sm90_attention_mask.cuh"
#include "sm90_attention_tiles.cuh"
#include "sm90_online_softmax.cuh"

namespace megatron_kanana::sm90 {

struct ForwardArguments {
  CUtensorMap query, key, value, out;
  float* logsumexp;   // [batch, heads, sequence]
  float* max_logits;  // [heads] or null
  int32_t* tile_counter;
  const int32_t* documents;
  int sequence, batch, heads;
  int queries_of_a_key;  // query heads that share a head of keys
  HeadGroups order;
  float softmax_scale;
  bool causal;
};

template <int kWidth_, int kValueWidth_>
struct ForwardTile {
  static constexpr int kWidth = kWidth_;
  static constexpr int kValueWidth = kValueWidth_;
  static constexpr int kWarpgroups = 2;  // of 64 queries each
  static constexpr int kQueries = 64 * kWarpgroups;
  static constexpr int kKeys = 128;
  static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroup;
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = 64 * kWidth * 2;  // of one warpgroup
  static constexpr int kKeyBytes = kKeys * kWidth * 2;
  static constexpr int kValueBytes = kKeys * kValueWidth * 2;

  // Chunks of columns follow each other: [chunk][row][64 columns].
  struct Shared {
    uint8_t query[kWarpgroups][kQueryBytes];
    uint8_t key[kStages][kKeyBytes];
    uint8_t value[kStages][kValueBytes];
    uint8_t out[kWarpgroups][64 * kChunk * 2];
    uint64_t query_full[kWarpgroups], query_empty[kWarpgroups];
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t value_full[kStages], value_empty[kStages];
    uint64_t tile_full[2], tile_empty[2];
    int tile[2];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // to align it
  static_assert(kSharedBytes <= 227 * 1024);
};

struct ForwardWork {
  int first_query;
  int head;  // of the sample
  int sample;

  // The last queries see most keys and come first.
  template <class Tile>
  __device__ static ForwardWork of(const ForwardArguments& arguments, int tile) {
    const auto place = arguments.order.of(tile);
    return {(arguments.order.rows - 1 - place.row) * Tile::kQueries, place.head % arguments.heads,
            place.head / arguments.heads};
  }
};

// Tiles of keys that queries of a tile see: at least one, if only to see nothing of it.
template <class Tile>
__device__ Run key_tiles_of(const AttentionMask& mask, int first_query) {
  Run tiles = mask.key_tiles<Tile::kQueries, Tile::kKeys>(first_query);
  tiles.end = max(tiles.begin + 1, tiles.end);
  return tiles;
}

template <class Tile>
__device__ void load_forward(const ForwardArguments& arguments, typename Tile::Shared& shared) {
  Ring<Tile::kStages> keys, values;
  Ring<2> slots;
  uint32_t query_parity = 1;
  const int tiles = arguments.order.rows * arguments.order.heads;
  for (int tile = blockIdx.x;; slots.advance()) {
    barrier_wait(&shared.tile_empty[slots.stage], slots.parity ^ 1);
    shared.tile[slots.stage] = tile;
    barrier_arrive(&shared.tile_full[slots.stage]);
    if (tile >= tiles) return;
    const int next = gridDim.x + atomicAdd(arguments.tile_counter, 1);

    const auto work = ForwardWork::of<Tile>(arguments, tile);
    const int key_head = work.head / arguments.queries_of_a_key;
    const AttentionMask mask(arguments.sequence, arguments.batch, work.sample, arguments.causal,
                             arguments.documents);
    const Run blocks = key_tiles_of<Tile>(mask, work.first_query);

    const auto load_keys = [&](int block) {
      barrier_wait(&shared.key_empty[keys.stage], keys.parity ^ 1);
      uint64_t* full = &shared.key_full[keys.stage];
      barrier_expect(full, Tile::kKeyBytes);
#pragma unroll
      for (int chunk = 0; chunk < Tile::kWidth / kChunk; ++chunk) {
        load_box(shared.key[keys.stage] + chunk * Tile::kKeys * 128, &arguments.key, full,
                 chunk * kChunk, block * Tile::kKeys, key_head, work.sample);
      }
      keys.advance();
    };
    const auto load_values = [&](int block) {
      barrier_wait(&shared.value_empty[values.stage], values.parity ^ 1);
      uint64_t* full = &shared.value_full[values.stage];
      barrier_expect(full, Tile::kValueBytes);
#pragma unroll
      for (int chunk = 0; chunk < Tile::kValueWidth / kChunk; ++chunk) {
        load_box(shared.value[values.stage] + chunk * Tile::kKeys * 128, &arguments.value, full,
                 chunk * kChunk, block * Tile::kKeys, key_head, work.sample);
      }
      values.advance();
    };

    load_keys(blocks.end - 1);
#pragma unroll
    for (int half = 0; half < Tile::kWarpgroups; ++half) {
      barrier_wait(&shared.query_empty[half], query_parity);
      uint64_t* full = &shared.query_full[half];
      barrier_expect(full, Tile::kQueryBytes);
#pragma unroll
      for (int chunk = 0; chunk < Tile::kWidth / kChunk; ++chunk) {
        load_box(shared.query[half] + chunk * 64 * 128, &arguments.query, full, chunk * kChunk,
                 work.first_query + 64 * half, work.head, work.sample);
      }
    }
    query_parity ^= 1;
    for (int block = blocks.end - 1; block > blocks.begin; --block) {
      load_keys(block - 1);
      load_values(block);
    }
    load_values(blocks.begin);
    tile = next;
  }
}

// The rows of a thread are complete: their outputs are normalised, their logsumexp written, and the
// head's largest logit raised.
template <int kCount>
__device__ __forceinline__ void finish_rows(const ForwardArguments& arguments,
                                            const ForwardWork& work, int row, SoftmaxRows& rows,
                                            float (&out)[kCount]) {
  const int lane = threadIdx.x % kWarp;
  float inverse[2];
  float highest = -INFINITY;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = rows.sum[i];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    inverse[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (row + 8 * i < arguments.sequence) {
      const float largest = rows.maximum[i] * arguments.softmax_scale;
      highest = fmaxf(highest, largest);
      if (lane % 4 == 0) {
        const int64_t head = int64_t(work.sample) * arguments.heads + work.head;
        arguments.logsumexp[head * arguments.sequence + row + 8 * i] =
            sum == 0.0f ? -INFINITY : largest + __logf(sum);
      }
    }
  }
  if (arguments.max_logits != nullptr) {
#pragma unroll
    for (int lanes = 4; lanes < kWarp; lanes *= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, lanes));
    }
    if (lane == 0) atomic_maximum(arguments.max_logits + work.head, highest);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] *= inverse[i / 2 % 2];
}

// A warpgroup's outputs, 64 columns at a time, through `staging` (64 rows x 64 columns).
template <class Tile>
__device__ __forceinline__ void store_rows(const ForwardArguments& arguments,
                                           const ForwardWork& work, int first_row,
                                           const float (&out)[Tile::kValueWidth / 2],
                                           uint8_t* staging) {
  const int thread = threadIdx.x % kWarpgroup;
  const int barrier = threadIdx.x / kWarpgroup;
#pragma unroll
  for (int chunk = 0; chunk < Tile::kValueWidth / kChunk; ++chunk) {
    uint32_t packed[kChunk / 16][4];
#pragma unroll
    for (int i = 0; i < kChunk / 2; i += 2) {
      packed[i / 8][i / 2 % 4] =
          pack_bf16(out[chunk * kChunk / 2 + i], out[chunk * kChunk / 2 + i + 1]);
    }
    if (thread == 0) bulk_wait_read();
    named_sync(barrier, kWarpgroup);
    stage_tile(shared_address(staging), packed);
    fence_shared_for_async();
    named_sync(barrier, kWarpgroup);
    if (thread == 0) {
      store_box(&arguments.out, staging, chunk * kChunk, first_row, work.head, work.sample);
      bulk_commit();
    }
  }
}

template <class Tile>
__device__ void multiply_forward(const ForwardArguments& arguments, typename Tile::Shared& shared) {
  const int half = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup - 1, 0);  // uniform
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = threadIdx.x % kWarp;
  const float scale_log2 = arguments.softmax_scale * kLog2E;
  const int tiles = arguments.order.rows * arguments.order.heads;
  const uint64_t query = descriptor<Swizzle::k128>(shared_address(shared.query[half]));
  Ring<Tile::kStages> keys, values;
  Ring<2> slots;
  uint32_t query_parity = 0;

  float scores[Tile::kKeys / 2];
  float out[Tile::kValueWidth / 2];
  // Of a step, and of the one before, whose product with the values comes after it.
  uint32_t even_weights[Tile::kKeys / 16][4], odd_weights[Tile::kKeys / 16][4];

  const auto multiply_keys = [&] {
    const uint64_t key = descriptor<Swizzle::k128>(shared_address(shared.key[keys.stage]));
    hold(scores);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kWidth / 16; ++k) {
      wgmma<false, false>(scores, advance(query, k / 4 * 64 * 128 + k % 4 * 32),
                          advance(key, k / 4 * Tile::kKeys * 128 + k % 4 * 32), k > 0);
    }
    wgmma_commit();
  };
  const auto release_keys = [&] {
    if (lane == 0) barrier_arrive(&shared.key_empty[keys.stage]);
    keys.advance();
  };
  const auto multiply_values = [&](const uint32_t (&weights)[Tile::kKeys / 16][4]) {
    barrier_wait(&shared.value_full[values.stage], values.parity);
    const uint64_t value =
        descriptor<Swizzle::k128>(shared_address(shared.value[values.stage]), Tile::kKeys * 128);
    hold(out);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kKeys / 16; ++k) {
      wgmma<true>(out, weights[k], advance(value, k * 16 * 128), true);
    }
    wgmma_commit();
  };
  const auto release_values = [&] {
    if (lane == 0) barrier_arrive(&shared.value_empty[values.stage]);
    values.advance();
  };
  const auto pack_weights = [&](uint32_t (&weights)[Tile::kKeys / 16][4]) {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 2; i += 2) {
      weights[i / 8][i / 2 % 4] = pack_bf16(scores[i], scores[i + 1]);
    }
  };

  const auto take_tile = [&] {
    barrier_wait(&shared.tile_full[slots.stage], slots.parity);
    const int tile = shared.tile[slots.stage];
    barrier_arrive(&shared.tile_empty[slots.stage]);  // every thread, since each has read it
    slots.advance();
    return __shfl_sync(0xffffffff, tile, 0);
  };
  const auto release_query = [&] {
    if (lane == 0) barrier_arrive(&shared.query_empty[half]);
  };
  // The first product of a tile; of no use after the last tile, but a branch around products would
  // make each wait for the one before.
  const auto begin_tile = [&](bool exists) {
    if (exists) {
      barrier_wait(&shared.query_full[half], query_parity);
      query_parity ^= 1;
      barrier_wait(&shared.key_full[keys.stage], keys.parity);
    }
    multiply_keys();
  };

  int tile = take_tile();
  begin_tile(true);
  wgmma_wait<0>();
  hold(scores);
#pragma unroll 1
  do {
    const auto work = ForwardWork::of<Tile>(arguments, tile);
    const AttentionMask mask(arguments.sequence, arguments.batch, work.sample, arguments.causal,
                             arguments.documents);
    const Run blocks = key_tiles_of<Tile>(mask, work.first_query);
    const int first_row = work.first_query + 64 * half;
    const int row = first_row + thread / kWarp * 16 + lane / 4;
    SoftmaxRows rows;
    const int all_see_from = mask.keys_of(min(first_row + 63, arguments.sequence - 1)).begin;
    const int all_see_to = mask.keys_of(first_row).end;
    const auto softmax = [&](int block, float (&decay)[2]) {
      const int key = block * Tile::kKeys;
      if (key < all_see_from || key + Tile::kKeys > all_see_to) {
        hide(scores, key, mask.keys_of(row), mask.keys_of(row + 8));
      }
      rows.update(scores, scale_log2, decay);
    };

    int block = __shfl_sync(0xffffffff, blocks.end - 1, 0);
    const int last = __shfl_sync(0xffffffff, blocks.begin, 0);
    float decay[2];
    release_keys();
    if (block == last) release_query();
    softmax(block, decay);
    pack_weights(even_weights);
#pragma unroll
    for (float& x : out) x = 0.0f;

    // The products of a step: keys of this block, values of the one before it.
    bool values_taken = false;
    const auto step = [&](const auto& weights, auto& next_weights) {
      barrier_wait(&shared.key_full[keys.stage], keys.parity);
      multiply_keys();
      wgmma_wait<1>();
      hold(out);
      if (values_taken) release_values();
      values_taken = true;
#pragma unroll
      for (int i = 0; i < Tile::kValueWidth / 2; ++i) out[i] *= decay[i / 2 % 2];
      multiply_values(weights);
      wgmma_wait<1>();
      hold(scores);
      release_keys();
      if (block == last) release_query();
      softmax(block, decay);
      pack_weights(next_weights);
    };
    const auto last_values = [&](const auto& weights) {
      wgmma_wait<0>();
      hold(out);
      if (values_taken) release_values();
#pragma unroll
      for (int i = 0; i < Tile::kValueWidth / 2; ++i) out[i] *= decay[i / 2 % 2];
      multiply_values(weights);
    };
#pragma unroll 1
    while (true) {
      if (--block < last) {
        last_values(even_weights);
        break;
      }
      step(even_weights, odd_weights);
      if (--block < last) {
        last_values(odd_weights);
        break;
      }
      step(odd_weights, even_weights);
    }

    tile = take_tile();
    begin_tile(tile < tiles);
    wgmma_wait<1>();
    hold(out);
    release_values();
    finish_rows(arguments, work, row, rows, out);
    store_rows<Tile>(arguments, work, first_row, out, shared.out[half]);
    wgmma_wait<0>();
    hold(scores);
  } while (tile < tiles);
  if (thread == 0) bulk_wait_read();
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  extern __shared__ uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(
      (reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = Tile::kWarpgroups * kWarpgroup / kWarp;
    for (int i = 0; i < Tile::kWarpgroups; ++i) {
      barrier_init(&shared.query_full[i], 1);
      barrier_init(&shared.query_empty[i], kWarpgroup / kWarp);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.tile_full[i], 1);
      barrier_init(&shared.tile_empty[i], Tile::kWarpgroups * kWarpgroup);
    }
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(&shared.key_full[i], 1);
      barrier_init(&shared.key_empty[i], kConsumerWarps);
      barrier_init(&shared.value_full[i], 1);
      barrier_init(&shared.value_empty[i], kConsumerWarps);
    }
    barrier_init_fence();
    prefetch_tensor_map(&arguments.query);
    prefetch_tensor_map(&arguments.key);
    prefetch_tensor_map(&arguments.value);
    prefetch_tensor_map(&arguments.out);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<40>();
    if (threadIdx.x == 0) load_forward<Tile>(arguments, shared);
  } else {
    take_registers<232>();
    multiply_forward<Tile>(arguments, shared);
  }
}

}  // namespace megatron_kanana::sm90

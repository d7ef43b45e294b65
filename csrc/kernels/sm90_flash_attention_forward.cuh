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

namespace megatron_kanana::sm90 {

constexpr int kForwardThreads = 3 * kWarpgroup;

struct ForwardArguments {
  CUtensorMap query, key, value, out;
  float* logsumexp;   // [batch, heads, sequence]
  float* max_logits;  // [heads] or null
  int32_t* tile_counter;
  const int32_t* documents;
  int sequence, batch, heads;
  int queries_of_a_key;  // query heads that share a head of keys
  int heads_at_once;     // heads worked on together, for the level-2 cache
  float softmax_scale;
  bool causal;
};

template <int kWidth_, int kValueWidth_>
struct ForwardTile {
  static constexpr int kWidth = kWidth_;
  static constexpr int kValueWidth = kValueWidth_;
  static constexpr int kQueries = 128;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = 64 * kWidth * 2;  // of one warpgroup
  static constexpr int kKeyBytes = kKeys * kWidth * 2;
  static constexpr int kValueBytes = kKeys * kValueWidth * 2;

  // Chunks of columns follow each other: [chunk][row][64 columns].
  struct Shared {
    uint8_t query[2][kQueryBytes];  // later the output of the same rows
    uint8_t key[kStages][kKeyBytes];
    uint8_t value[kStages][kValueBytes];
    uint64_t query_full[2], query_empty[2];
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t value_full[kStages], value_empty[kStages];
    uint64_t tile_full[2], tile_empty[2];
    int tile[2];
  };
  static_assert(kValueWidth <= kWidth, "the output takes the queries' place");
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // to align it
};

struct ForwardWork {
  int first_query;
  int head;  // of the sample
  int sample;

  // Heads in groups that the cache holds; within a group the last queries, which see most keys,
  // come first.
  template <class Tile>
  __device__ static ForwardWork of(const ForwardArguments& arguments, int tile) {
    const int rows = (arguments.sequence + Tile::kQueries - 1) / Tile::kQueries;
    const int all_heads = arguments.batch * arguments.heads;
    const int group = tile / (arguments.heads_at_once * rows);
    const int first_head = group * arguments.heads_at_once;
    const int heads = min(arguments.heads_at_once, all_heads - first_head);
    const int within = tile - first_head * rows;
    const int head = first_head + within % heads;
    return {(rows - 1 - within / heads) * Tile::kQueries, head % arguments.heads,
            head / arguments.heads};
  }

  template <class Tile>
  __device__ static int count(const ForwardArguments& arguments) {
    return (arguments.sequence + Tile::kQueries - 1) / Tile::kQueries * arguments.batch *
           arguments.heads;
  }
};

template <class Tile>
__device__ void load_forward(const ForwardArguments& arguments, typename Tile::Shared& shared) {
  Ring<Tile::kStages> keys, values;
  Ring<2> slots;
  uint32_t query_parity = 1;
  const int tiles = ForwardWork::count<Tile>(arguments);
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
    const Run blocks = mask.key_tiles<Tile::kQueries, Tile::kKeys>(work.first_query);

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

    if (blocks.begin < blocks.end) load_keys(blocks.end - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
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
    if (blocks.begin < blocks.end) load_values(blocks.begin);
    tile = next;
  }
}

// Two rows of a thread: what they see, their running maximum of unscaled logits, their sums.
struct SoftmaxRows {
  Run visible[2];
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  template <int kCount>
  __device__ __forceinline__ void hide(float (&scores)[kCount], int first_key) const {
    const int column = first_key + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int key = column + i / 4 * 8 + i % 2;
      const Run& run = visible[i / 2 % 2];
      if (key < run.begin || key >= run.end) scores[i] = -INFINITY;
    }
  }

  // scores to exp(scale * (scores - maximum)), sums brought up to date; `decay` is what earlier
  // sums and outputs shrink by.
  template <int kCount>
  __device__ __forceinline__ void update(float (&scores)[kCount], float scale_log2,
                                         float (&decay)[2]) {
    float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], scores[i]);
    }
    float shift[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      highest[row] = fmaxf(highest[row], __shfl_xor_sync(0xffffffff, highest[row], 1));
      highest[row] = fmaxf(highest[row], __shfl_xor_sync(0xffffffff, highest[row], 2));
      // Where nothing is visible yet, minus infinity less minus infinity would be no number.
      shift[row] = highest[row] == -INFINITY ? 0.0f : highest[row] * scale_log2;
      decay[row] = exp2_approximate(maximum[row] * scale_log2 - shift[row]);
      maximum[row] = highest[row];
      sum[row] *= decay[row];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scores[i] = exp2_approximate(fmaf(scores[i], scale_log2, -shift[i / 2 % 2]));
      sum[i / 2 % 2] += scores[i];
    }
  }
};

__device__ __forceinline__ void atomic_maximum(float* address, float value) {
  value += 0.0f;  // minus zero has the bits of the smallest integer
  if (value <= *const_cast<volatile float*>(address)) return;
  if (value >= 0.0f) {
    atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
  } else {
    atomicMin(reinterpret_cast<unsigned*>(address), __float_as_uint(value));
  }
}

template <class Tile>
__device__ void multiply_forward(const ForwardArguments& arguments, typename Tile::Shared& shared) {
  const int half = threadIdx.x / kWarpgroup - 1;
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = threadIdx.x % kWarp;
  const float scale_log2 = arguments.softmax_scale * kLog2E;
  const int tiles = ForwardWork::count<Tile>(arguments);
  const uint32_t query = shared_address(shared.query[half]);
  Ring<Tile::kStages> keys, values;
  Ring<2> slots;
  uint32_t query_parity = 0;

  float scores[Tile::kKeys / 2];
  float out[Tile::kValueWidth / 2];
  uint32_t weights[Tile::kKeys / 16][4];

  const auto multiply_keys = [&] {
    barrier_wait(&shared.key_full[keys.stage], keys.parity);
    const uint32_t key = shared_address(shared.key[keys.stage]);
    hold(scores);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kWidth / 16; ++k) {
      const uint32_t within = k % 4 * 32;
      wgmma<false, false>(scores, descriptor<Swizzle::k128>(query + k / 4 * 64 * 128 + within),
                          descriptor<Swizzle::k128>(key + k / 4 * Tile::kKeys * 128 + within),
                          k > 0);
    }
    wgmma_commit();
  };
  const auto release_keys = [&] {
    if (lane == 0) barrier_arrive(&shared.key_empty[keys.stage]);
    keys.advance();
  };
  const auto multiply_values = [&](bool accumulate) {
    barrier_wait(&shared.value_full[values.stage], values.parity);
    const uint32_t value = shared_address(shared.value[values.stage]);
    hold(out);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kKeys / 16; ++k) {
      wgmma<true>(out, weights[k],
                  descriptor<Swizzle::k128>(value + k * 16 * 128, Tile::kKeys * 128),
                  accumulate || k > 0);
    }
    wgmma_commit();
  };
  const auto release_values = [&] {
    if (lane == 0) barrier_arrive(&shared.value_empty[values.stage]);
    values.advance();
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 2; i += 2) {
      weights[i / 8][i / 2 % 4] = pack_bf16(scores[i], scores[i + 1]);
    }
  };

  for (;; slots.advance()) {
    barrier_wait(&shared.tile_full[slots.stage], slots.parity);
    const int tile = shared.tile[slots.stage];
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.tile_empty[slots.stage]);
    if (tile >= tiles) return;

    const auto work = ForwardWork::of<Tile>(arguments, tile);
    const AttentionMask mask(arguments.sequence, arguments.batch, work.sample, arguments.causal,
                             arguments.documents);
    const Run blocks = mask.key_tiles<Tile::kQueries, Tile::kKeys>(work.first_query);
    const int first_row = work.first_query + 64 * half;
    const int row = first_row + thread / kWarp * 16 + lane / 4;
    SoftmaxRows rows{.visible = {mask.keys_of(row), mask.keys_of(row + 8)}};
    const int all_see_from = mask.keys_of(min(first_row + 63, arguments.sequence - 1)).begin;
    const int all_see_to = mask.keys_of(first_row).end;
    const auto softmax = [&](int block, float (&decay)[2]) {
      const int key = block * Tile::kKeys;
      if (key < all_see_from || key + Tile::kKeys > all_see_to) rows.hide(scores, key);
      rows.update(scores, scale_log2, decay);
    };

    barrier_wait(&shared.query_full[half], query_parity);
    query_parity ^= 1;
    if (blocks.begin < blocks.end) {
      float decay[2];
      multiply_keys();
      wgmma_wait<0>();
      hold(scores);
      release_keys();
      softmax(blocks.end - 1, decay);
      pack_weights();
#pragma unroll
      for (int i = 0; i < Tile::kValueWidth / 2; ++i) out[i] = 0.0f;
#pragma unroll 1
      for (int block = blocks.end - 2; block >= blocks.begin; --block) {
        multiply_keys();
        multiply_values(true);
        wgmma_wait<1>();
        hold(scores);
        release_keys();
        softmax(block, decay);
        wgmma_wait<0>();
        hold(out);
        release_values();
#pragma unroll
        for (int i = 0; i < Tile::kValueWidth / 2; ++i) out[i] *= decay[i / 2 % 2];
        pack_weights();
      }
      multiply_values(true);
      wgmma_wait<0>();
      hold(out);
      release_values();
    } else {
#pragma unroll
      for (int i = 0; i < Tile::kValueWidth / 2; ++i) out[i] = 0.0f;
    }

    float inverse[2];
    float highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows.sum[i] += __shfl_xor_sync(0xffffffff, rows.sum[i], 1);
      rows.sum[i] += __shfl_xor_sync(0xffffffff, rows.sum[i], 2);
      inverse[i] = rows.sum[i] == 0.0f ? 0.0f : 1.0f / rows.sum[i];
      if (row + 8 * i < arguments.sequence) {
        const float largest = rows.maximum[i] * arguments.softmax_scale;
        highest = fmaxf(highest, largest);
        if (lane % 4 == 0) {
          const int64_t head = int64_t(work.sample) * arguments.heads + work.head;
          arguments.logsumexp[head * arguments.sequence + row + 8 * i] =
              rows.sum[i] == 0.0f ? -INFINITY : largest + __logf(rows.sum[i]);
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

    named_sync(1 + half, kWarpgroup);  // every warp has read its queries
    stage_rows(query, out, inverse[0], inverse[1]);
    fence_shared_for_async();
    named_sync(1 + half, kWarpgroup);
    if (thread == 0) {
#pragma unroll
      for (int chunk = 0; chunk < Tile::kValueWidth / kChunk; ++chunk) {
        store_box(&arguments.out, shared.query[half] + chunk * 64 * 128, chunk * kChunk, first_row,
                  work.head, work.sample);
      }
      bulk_commit();
      bulk_wait_read();
      barrier_arrive(&shared.query_empty[half]);
    }
    __syncwarp();
  }
}

template <class Tile>
__global__ void __launch_bounds__(kForwardThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  extern __shared__ uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(
      (reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 2 * kWarpgroup / kWarp;
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.query_full[i], 1);
      barrier_init(&shared.query_empty[i], 1);
      barrier_init(&shared.tile_full[i], 1);
      barrier_init(&shared.tile_empty[i], kConsumerWarps);
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

// FlashAttention backward for Hopper.
//
// A block holds 128 keys and values of a head and walks over the queries that see them, 64 at a
// time. Its two warpgroups own 64 keys each, with the gradients of keys and values in registers:
//
//   S^T  = K Q^T          P = exp(scale S - logsumexp)
//   dP^T = V dO^T         dS = P (dP - sum(dO O))
//   dV  += P^T dO         dK += dS^T Q        dQ += dS K
//
// dS goes through shared memory, since dQ sums over the keys of both warpgroups; each of them makes
// half of dQ's columns, which a further warp adds to fp32 sums in global memory (TMA). The product
// for dK of one step is cut in three parts, which run beside the three spells of other work.
//
// P is kept times 2^15 in fp16 between its two uses: five times more exact than bf16, in half the
// registers of fp32. The factor keeps small weights from losing bits and is divided out at the end.
//
// Keys lie in chunks of 32 columns, so that half of 192 columns is a whole number of chunks.
#pragma once

#include <type_traits>

#include "sm90_attention_mask.cuh"
#include "sm90_attention_tiles.cuh"

namespace megatron_kanana::sm90 {

constexpr int kBackwardThreads = 3 * kWarpgroup;
constexpr float kWeightExponent = 15.0f;        // weights are held times 2 to this power
constexpr float kWeightUnit = 1.0f / 32768.0f;  // and their products multiplied by this

struct BackwardArguments {
  CUtensorMap query, key, value, grad_out, grad_key, grad_value;
  // [batch, heads, padded sequence]: logsumexp in powers of two less kWeightExponent, or infinity
  // where a query sees nothing; sum of grad_out times out.
  const float* logsumexp_log2;
  const float* out_dot_grad;
  float* grad_query;  // fp32 [batch, heads, tiles, 2, 16-row fragments], see `grad_query_part`
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
    float logsumexp_log2[kStages][kQueries];
    float out_dot_grad[kStages][kQueries];
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
      const int64_t statistics =
          query_tile_index<Tile>(arguments, work.sample, head, tile) * Tile::kQueries;
      constexpr int kStatisticsBytes = Tile::kQueries * sizeof(float);
      barrier_wait(&shared.query_empty[ring.stage], ring.parity ^ 1);
      uint64_t* full = &shared.query_full[ring.stage];
      barrier_expect(full, Tile::kQueryBytes + kStatisticsBytes);
#pragma unroll
      for (int chunk = 0; chunk < Tile::kWidth / 64; ++chunk) {
        load_box(shared.query[ring.stage] + chunk * Tile::kQueries * 128, &arguments.query, full,
                 chunk * 64, row, head, work.sample);
      }
      load_bytes(shared.logsumexp_log2[ring.stage], arguments.logsumexp_log2 + statistics,
                 kStatisticsBytes, full);
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
      barrier_expect(full, Tile::kGradOutBytes + kStatisticsBytes);
#pragma unroll
      for (int chunk = 0; chunk < Tile::kValueWidth / 64; ++chunk) {
        load_box(shared.grad_out[ring.stage] + chunk * Tile::kQueries * 128, &arguments.grad_out,
                 full, chunk * 64, row, head, work.sample);
      }
      load_bytes(shared.out_dot_grad[ring.stage], arguments.out_dot_grad + statistics,
                 kStatisticsBytes, full);
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

template <class Tile>
__device__ void multiply_backward(const BackwardArguments& arguments, const BackwardWork& work,
                                  Run tiles, typename Tile::Shared& shared) {
  constexpr int kWidth = Tile::kWidth;
  constexpr int kValueWidth = Tile::kValueWidth;
  constexpr int kQueries = Tile::kQueries;
  constexpr int kKeys = Tile::kKeys;
  constexpr int kFirstPart = 1, kSecondPart = 2, kParts = kQueries / 16;  // of the product for dK
  const int half = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup - 1, 0);  // uniform
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = threadIdx.x % kWarp;
  const float scale_log2 = arguments.softmax_scale * kLog2E;
  const int first_row = work.first_key + 64 * half;
  const int row = first_row + thread / kWarp * 16 + lane / 4;
  const AttentionMask mask(arguments.sequence, arguments.batch, work.sample, arguments.causal,
                           arguments.documents);
  const int all_seen_from = mask.queries_of(min(first_row + 63, arguments.sequence - 1)).begin;
  // A tile with rows past the end is masked whole.
  const int all_seen_to = first_row + 64 > arguments.sequence ? 0 : mask.queries_of(first_row).end;

  const uint64_t key = descriptor<Swizzle::k64>(shared_address(shared.key) + half * 64 * 64);
  const uint64_t key_columns = descriptor<Swizzle::k64>(
      shared_address(shared.key) + half * (kWidth / 64) * kKeys * 64, kKeys * 64);
  const uint64_t value = descriptor<Swizzle::k128>(shared_address(shared.value) + half * 64 * 128);
  const uint64_t grad_scores = descriptor<Swizzle::k128>(shared_address(shared.grad_scores));
  const uint32_t own_grad_scores = shared_address(shared.grad_scores) + half * 64 * 128;

  float grad_key[kWidth / 2];
  float grad_value[kValueWidth / 2];
#pragma unroll
  for (float& x : grad_key) x = 0.0f;
#pragma unroll
  for (float& x : grad_value) x = 0.0f;

  Ring<Tile::kStages> ring;
  int last_stage = 0;  // of the queries whose product for dK is not complete
  const int count =
      __shfl_sync(0xffffffff, (tiles.end - tiles.begin) * arguments.queries_of_a_key, 0);

  // Parts [begin, end) of dK += dS^T Q.
  const auto multiply_grad_key = [&](int stage, auto begin, auto end) {
    const uint64_t query =
        descriptor<Swizzle::k128>(shared_address(shared.query[stage]), kQueries * 128);
    wgmma_fence();
#pragma unroll
    for (int k = begin; k < end; ++k) {
      wgmma<false, true>(grad_key, advance(grad_scores, half * 64 * 128 + k * 32),
                         advance(query, k * 16 * 128), true);
    }
    wgmma_commit();
  };
  float scores[kQueries / 2];
  const auto multiply_scores = [&](const Ring<Tile::kStages>& at) {
    const uint64_t query = descriptor<Swizzle::k128>(shared_address(shared.query[at.stage]));
    hold(scores);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      wgmma<false, false>(scores, advance(key, k / 2 * kKeys * 64 + k % 2 * 32),
                          advance(query, k / 4 * kQueries * 128 + k % 4 * 32), k > 0);
    }
    wgmma_commit();
  };
  constexpr std::integral_constant<int, 0> kBegin;
  constexpr std::integral_constant<int, kFirstPart> kFirst;
  constexpr std::integral_constant<int, kSecondPart> kSecond;
  constexpr std::integral_constant<int, kParts> kEnd;

  hold(grad_key);
  hold(grad_value);

  // The first step completes a step before it, of zeros.
  const uint32_t zeros[kParts][4] = {};
  stage_tile(own_grad_scores, zeros);
  fence_shared_for_async();
  named_sync(kGradScoresFree + half, kWarpgroup);
  barrier_wait(&shared.key_full, 0);
  barrier_wait(&shared.query_full[0], 0);
  multiply_scores(ring);
  multiply_grad_key(last_stage, kFirst, kSecond);
  barrier_wait(&shared.value_full, 0);
  wgmma_wait<1>();
  hold(scores);
  int tile = tiles.begin;
  int step = 0;
#pragma unroll 1
  do {
    const int first_query = tile * kQueries;
    if (++tile == tiles.end) tile = tiles.begin;
    const float* logsumexp_log2 = shared.logsumexp_log2[ring.stage] + 2 * (lane % 4);
    const float* out_dot_grad = shared.out_dot_grad[ring.stage] + 2 * (lane % 4);

    if (first_query < all_seen_from || first_query + kQueries > all_seen_to) {
      hide(scores, first_query, mask.queries_of(row), mask.queries_of(row + 8));
    }
    uint32_t weights[kQueries / 4];  // fp16
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 4) {
      const float2 at = *reinterpret_cast<const float2*>(logsumexp_log2 + i / 4 * 8);
      weights[i / 2] = pack_fp16(exp2_approximate(fmaf(scores[i], scale_log2, -at.x)),
                                 exp2_approximate(fmaf(scores[i + 1], scale_log2, -at.y)));
      weights[i / 2 + 1] = pack_fp16(exp2_approximate(fmaf(scores[i + 2], scale_log2, -at.x)),
                                     exp2_approximate(fmaf(scores[i + 3], scale_log2, -at.y)));
    }

    barrier_wait(&shared.grad_out_full[ring.stage], ring.parity);
    const uint32_t grad_out_address = shared_address(shared.grad_out[ring.stage]);
    const uint64_t grad_out = descriptor<Swizzle::k128>(grad_out_address);
    const uint64_t grad_out_rows = descriptor<Swizzle::k128>(grad_out_address, kQueries * 128);
    float grad_weights[kQueries / 2];
    hold(grad_weights);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kValueWidth / 16; ++k) {
      wgmma<false, false>(grad_weights, advance(value, k / 4 * kKeys * 128 + k % 4 * 32),
                          advance(grad_out, k / 4 * kQueries * 128 + k % 4 * 32), k > 0);
    }
    wgmma_commit();
    multiply_grad_key(last_stage, kSecond, kEnd);
    wgmma_wait<1>();
    hold(grad_weights);

    uint32_t rounded[kQueries / 16][4];          // dS^T, bf16
    uint32_t rounded_weights[kQueries / 16][4];  // P^T, bf16
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 4) {
      const float2 at = *reinterpret_cast<const float2*>(out_dot_grad + i / 4 * 8);
      const float2 upper = unpack_fp16(weights[i / 2]);
      const float2 lower = unpack_fp16(weights[i / 2 + 1]);
      rounded[i / 8][i / 2 % 4] =
          pack_bf16(upper.x * (grad_weights[i] - at.x), upper.y * (grad_weights[i + 1] - at.y));
      rounded[i / 8][i / 2 % 4 + 1] =
          pack_bf16(lower.x * (grad_weights[i + 2] - at.x), lower.y * (grad_weights[i + 3] - at.y));
      rounded_weights[i / 8][i / 2 % 4] = pack_bf16(upper.x, upper.y);
      rounded_weights[i / 8][i / 2 % 4 + 1] = pack_bf16(lower.x, lower.y);
    }
    wgmma_wait<0>();  // dK of the step before: its dS and queries are free
    hold(grad_key);
    if (step > 0) {
      if (lane == 0) barrier_arrive(&shared.query_empty[last_stage]);
      named_sync(kGradScoresFree + half, 2 * kWarpgroup);
    }

    hold(grad_value);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kQueries / 16; ++k) {
      wgmma<true>(grad_value, rounded_weights[k], advance(grad_out_rows, k * 16 * 128), true);
    }
    wgmma_commit();
    stage_tile(own_grad_scores, rounded);
    fence_shared_for_async();
    named_sync(kGradScoresWritten, 2 * kWarpgroup);
    wgmma_wait<0>();
    hold(grad_value);
    if (lane == 0) barrier_arrive(&shared.grad_out_empty[ring.stage]);

    float grad_query[kWidth / 4];
    hold(grad_query);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      wgmma<true, true>(grad_query, advance(grad_scores, k * 16 * 128),
                        advance(key_columns, k * 16 * 64), k > 0);
    }
    wgmma_commit();
    multiply_grad_key(ring.stage, kBegin, kFirst);
    wgmma_wait<1>();
    hold(grad_query);
    if (step + 1 < count) named_arrive(kGradScoresFree + 1 - half, 2 * kWarpgroup);
    if (step > 0) named_sync(kGradQueryEmpty + half, kWarpgroup + kWarp);
    auto* part = reinterpret_cast<float4*>(shared.grad_query[half]) + thread;
#pragma unroll
    for (int i = 0; i < kWidth / 4; i += 4) {
      part[i / 4 * kWarpgroup] =
          make_float4(grad_query[i], grad_query[i + 1], grad_query[i + 2], grad_query[i + 3]);
    }
    fence_shared_for_async();
    named_arrive(kGradQueryFull + half, kWarpgroup + kWarp);

    last_stage = ring.stage;
    ring.advance();
    // After the last step a product of no use, since a branch here would make all wait for each.
    if (step + 1 < count) barrier_wait(&shared.query_full[ring.stage], ring.parity);
    multiply_scores(ring);
    multiply_grad_key(last_stage, kFirst, kSecond);
    wgmma_wait<1>();
    hold(scores);
  } while (++step < count);
  multiply_grad_key(last_stage, kSecond, kEnd);
  wgmma_wait<0>();
  hold(grad_key);
  hold(scores);
  named_sync(kGradQueryEmpty + half, kWarpgroup + kWarp);

  named_sync(kAllGradQuery, 2 * kWarpgroup);  // the keys' place is free
  const float unscale = arguments.softmax_scale * kWeightUnit;
  uint8_t* staged_key = shared.key + half * 64 * kWidth * 2;
  uint8_t* staged_value = shared.value + half * 64 * kValueWidth * 2;
  stage_rows(shared_address(staged_key), grad_key, unscale, unscale);
  stage_rows(shared_address(staged_value), grad_value, kWeightUnit, kWeightUnit);
  fence_shared_for_async();
  named_sync(kGradScoresFree + half, kWarpgroup);
  if (thread == 0) {
#pragma unroll
    for (int chunk = 0; chunk < kWidth / 64; ++chunk) {
      store_box(&arguments.grad_key, staged_key + chunk * 64 * 128, chunk * 64, first_row,
                work.key_head, work.sample);
    }
#pragma unroll
    for (int chunk = 0; chunk < kValueWidth / 64; ++chunk) {
      store_box(&arguments.grad_value, staged_value + chunk * 64 * 128, chunk * 64, first_row,
                work.key_head, work.sample);
    }
    bulk_commit();
    bulk_wait_read();
  }
}

template <class Tile>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  extern __shared__ uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(
      (reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 2 * kWarpgroup / kWarp;
    barrier_init(&shared.key_full, 1);
    barrier_init(&shared.value_full, 1);
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(&shared.query_full[i], 1);
      barrier_init(&shared.query_empty[i], kConsumerWarps);
      barrier_init(&shared.grad_out_full[i], 1);
      barrier_init(&shared.grad_out_empty[i], kConsumerWarps);
    }
    barrier_init_fence();
    // Blocks wait for blocks started before them, whatever order the hardware starts them in.
    shared.block =
        arguments.next_block == nullptr ? blockIdx.x : atomicAdd(arguments.next_block, 1);
  }
  __syncthreads();
  const auto work = BackwardWork::of<Tile>(arguments, shared.block);
  const AttentionMask mask(arguments.sequence, arguments.batch, work.sample, arguments.causal,
                           arguments.documents);
  const Run tiles = query_tiles_of<Tile>(mask, work.first_key);
  if (threadIdx.x < kWarpgroup) {
    give_registers<24>();
    const int warp = threadIdx.x / kWarp;
    if (threadIdx.x == 0) load_backward<Tile>(arguments, work, tiles, shared);
    if (warp == 1 || warp == 2) add_grad_query<Tile>(arguments, work, tiles, warp - 1, shared);
  } else {
    take_registers<240>();
    multiply_backward<Tile>(arguments, work, tiles, shared);
  }
}

}  // namespace megatron_kanana::sm90

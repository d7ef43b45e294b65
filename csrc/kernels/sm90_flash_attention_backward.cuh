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
// Keys lie in chunks of 32 columns, so that half of 192 columns is a whole number of chunks.
#pragma once

#include <type_traits>

#include "sm90_flash_attention_backward_copies.cuh"

namespace megatron_kanana::sm90 {

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
  constexpr std::integral_constant<int, 0> kEarlier;  // halves of the queries
  constexpr std::integral_constant<int, 1> kLater;

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
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) {
      const float2 at = *reinterpret_cast<const float2*>(logsumexp_log2 + i / 4 * 8);
      scores[i] = exp2_approximate(fmaf(scores[i], scale_log2, i % 2 == 0 ? -at.x : -at.y));
    }

    barrier_wait(&shared.grad_out_full[ring.stage], ring.parity);
    const uint32_t grad_out_address = shared_address(shared.grad_out[ring.stage]);
    const uint64_t grad_out = descriptor<Swizzle::k128>(grad_out_address);
    const uint64_t grad_out_rows = descriptor<Swizzle::k128>(grad_out_address, kQueries * 128);
    uint32_t rounded[kQueries / 16][4];          // dS^T, bf16
    uint32_t rounded_weights[kQueries / 16][4];  // P^T, bf16
    // For half of the queries: all would need more registers than there are.
    float grad_weights[kQueries / 4];
    const auto multiply_weights = [&](auto part) {
      hold(grad_weights);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kValueWidth / 16; ++k) {
        wgmma<false, false>(
            grad_weights, advance(value, k / 4 * kKeys * 128 + k % 4 * 32),
            advance(grad_out, part * 32 * 128 + k / 4 * kQueries * 128 + k % 4 * 32), k > 0);
      }
      wgmma_commit();
    };
    const auto round_part = [&](auto part) {
#pragma unroll
      for (int i = 0; i < kQueries / 4; i += 2) {
        const int at = part * kQueries / 4 + i;
        const float2 dot = *reinterpret_cast<const float2*>(out_dot_grad + at / 4 * 8);
        rounded[at / 8][at / 2 % 4] = pack_bf16(scores[at] * (grad_weights[i] - dot.x),
                                                scores[at + 1] * (grad_weights[i + 1] - dot.y));
        rounded_weights[at / 8][at / 2 % 4] = pack_bf16(scores[at], scores[at + 1]);
      }
    };
    multiply_weights(kEarlier);
    multiply_grad_key(last_stage, kSecond, kEnd);
    wgmma_wait<1>();
    hold(grad_weights);
    round_part(kEarlier);
    multiply_weights(kLater);
    wgmma_wait<0>();  // dK of the step before: its dS and queries are free
    hold(grad_key);
    hold(grad_weights);
    round_part(kLater);
    if (step > 0) {
      // Every thread, since each has read numbers that came with the queries.
      barrier_arrive(&shared.query_empty[last_stage]);
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
  uint8_t* staged_key = shared.key + half * 64 * kWidth * 2;
  uint8_t* staged_value = shared.value + half * 64 * kValueWidth * 2;
  stage_rows(shared_address(staged_key), grad_key, arguments.softmax_scale);
  stage_rows(shared_address(staged_value), grad_value, 1.0f);
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
      barrier_init(&shared.query_empty[i], 2 * kWarpgroup);
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

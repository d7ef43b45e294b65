// Sorts the slots by expert, those of an expert in the order of the slots: a counting sort of three
// launches, whatever the number of experts.
#include <cuda_runtime.h>

#include "moe.h"
#include "sm90_launch.h"
#include "sm90_primitives.cuh"

namespace megatron_kanana {
namespace {

using sm90::kWarp;

constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRounds = 4;  // of a warp: it sorts kRounds * 32 slots that follow each other
constexpr int kBlockSlots = kThreads * kRounds;
constexpr int kAtOnce = 8;  // counts whose loads are under way together

int block_count(int64_t slots) { return static_cast<int>((slots + kBlockSlots - 1) / kBlockSlots); }

// counts[block][expert]: slots of the expert in the block.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const int32_t* __restrict__ experts_of_slots, int64_t slots, int experts,
                 int32_t* __restrict__ counts) {
  __shared__ int32_t sums[kMaxExperts];
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) sums[expert] = 0;
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * kBlockSlots + threadIdx.x;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t slot = first + round * kThreads;
    const int expert = slot < slots ? experts_of_slots[slot] : -1;
    if (expert >= 0) atomicAdd(&sums[expert], 1);
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    counts[int64_t(blockIdx.x) * experts + expert] = sums[expert];
  }
}

// Turns counts[block][expert] into the row of the first such slot; offsets into each expert's rows.
// One block, a thread an expert.
__global__ void __launch_bounds__(kMaxExperts)
    scan_kernel(int blocks, int experts, int32_t* __restrict__ counts,
                int32_t* __restrict__ offsets) {
  __shared__ int32_t through[kMaxExperts];
  const int expert = threadIdx.x;
  int32_t total = 0;
  if (expert < experts) {
    for (int first = 0; first < blocks; first += kAtOnce) {
      int32_t loaded[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < blocks) loaded[i] = counts[int64_t(first + i) * experts + expert];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < blocks) {
          counts[int64_t(first + i) * experts + expert] = total;
          total += loaded[i];
        }
      }
    }
  }
  through[expert] = total;
  __syncthreads();
  for (int distance = 1; distance < kMaxExperts; distance *= 2) {
    const int32_t other = expert >= distance ? through[expert - distance] : 0;
    __syncthreads();
    through[expert] += other;
    __syncthreads();
  }
  if (expert >= experts) return;
  const int32_t begin = through[expert] - total;
  if (expert == 0) offsets[0] = 0;
  offsets[expert + 1] = begin + total;
  for (int block = 0; block < blocks; ++block) counts[int64_t(block) * experts + expert] += begin;
}

// Gives each slot its row. A warp ranks its slots among those of the same expert, 32 at a time.
__global__ void __launch_bounds__(kThreads)
    place_kernel(const int32_t* __restrict__ experts_of_slots, int64_t slots, int experts,
                 int64_t rows, const int32_t* __restrict__ first_rows,
                 int32_t* __restrict__ slot_of_row, int32_t* __restrict__ row_of_slot) {
  extern __shared__ uint16_t ranks[];  // [warp][expert]: slots before those of the warp
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint16_t* own = ranks + warp * experts;
  for (int expert = lane; expert < experts; expert += kWarp) own[expert] = 0;
  __syncwarp();
  const int64_t first = int64_t(blockIdx.x) * kBlockSlots + int64_t(warp) * kRounds * kWarp + lane;
  int expert_of[kRounds], rank_of[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t slot = first + round * kWarp;
    const int expert = slot < slots ? experts_of_slots[slot] : -1;
    const uint32_t same = __match_any_sync(~0u, expert);
    const int before = __popc(same & ((1u << lane) - 1));
    expert_of[round] = expert;
    rank_of[round] = expert >= 0 ? own[expert] + before : 0;
    __syncwarp();
    if (expert >= 0 && before == 0) own[expert] += static_cast<uint16_t>(__popc(same));
    __syncwarp();
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    uint16_t sum = 0;
#pragma unroll 8
    for (int other = 0; other < kWarps; ++other) {
      const uint16_t count = ranks[other * experts + expert];
      ranks[other * experts + expert] = sum;
      sum += count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t slot = first + round * kWarp;
    if (slot >= slots) continue;
    const int expert = expert_of[round];
    int row = -1;
    if (expert >= 0) {
      row = first_rows[int64_t(blockIdx.x) * experts + expert] + own[expert] + rank_of[round];
      if (row < rows) slot_of_row[row] = static_cast<int32_t>(slot);
    }
    row_of_slot[slot] = row;
  }
}

}  // namespace

int64_t moe_permutation_workspace_bytes(int64_t slots, int experts) {
  return int64_t(block_count(slots)) * experts * sizeof(int32_t);
}

void moe_permutation(const int32_t* experts_of_slots, int64_t slots, int experts, int64_t rows,
                     int32_t* offsets, int32_t* slot_of_row, int32_t* row_of_slot, void* workspace,
                     void* stream) {
  auto* const counts = static_cast<int32_t*>(workspace);
  const auto queue = static_cast<cudaStream_t>(stream);
  const int blocks = block_count(slots);
  if (blocks > 0) {
    count_kernel<<<blocks, kThreads, 0, queue>>>(experts_of_slots, slots, experts, counts);
  }
  scan_kernel<<<1, kMaxExperts, 0, queue>>>(blocks, experts, counts, offsets);
  if (blocks > 0) {
    place_kernel<<<blocks, kThreads, kWarps * experts * sizeof(uint16_t), queue>>>(
        experts_of_slots, slots, experts, rows, counts, slot_of_row, row_of_slot);
  }
  sm90::check_cuda("moe_permutation");
}

}  // namespace megatron_kanana

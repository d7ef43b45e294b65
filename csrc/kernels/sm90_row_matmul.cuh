// Products of each expert's rows with its weights, all experts in one launch:
// D[row, :] = A[row, :] B[expert of row], then what an epilogue makes of D.
//
// A block holds 128 rows and kColumns columns. One warpgroup loads, two of 64 rows each multiply
// (wgmma). Rows of A lie in order, and come by the bulk copy engine, or are gathered by the tokens
// they belong to, and come by 16-byte copies of single threads. Blocks are persistent. The loading
// warpgroup alone finds out what the tiles are, and tells the others.
#pragma once

#include "sm90_row_groups.cuh"

namespace megatron_kanana::sm90 {

constexpr int kDepth = 64;  // of the summed dimension in a stage

// Rows of a tensor by the tokens they belong to: row r is token (slot_of_row[r] /
// slots_of_a_token); without slot_of_row, token r.
struct GatheredRows {
  const __nv_bfloat16* data;  // [tokens, width]
  const int32_t* slot_of_row;
  int slots_of_a_token;
  int width;

  // In two steps, for the first waits for memory when the second is taken.
  __device__ __forceinline__ int slot(int row) const {
    return slot_of_row == nullptr ? row : __ldg(slot_of_row + row);
  }
  __device__ __forceinline__ int token(int slot) const { return slot / slots_of_a_token; }

  __device__ __forceinline__ const __nv_bfloat16* row(int token) const {
    return data + int64_t(token) * width;
  }
};

template <class Epilogue>
struct RowMatmulArguments {
  CUtensorMap a;  // [1, rows, depth], boxes of 128 rows; unused where rows are gathered
  CUtensorMap b;  // weights [experts, ., .]
  GatheredRows gathered;
  RowGroups groups;
  int depth;  // length of the summed dimension
  int column_tiles;
  int second_half;  // where the second half of a tile's rows of B begins, after the first's begin
  typename Epilogue::Arguments epilogue;
};

// Of numbers that are what they are.
struct NoScales {
  static constexpr bool kCopied = false;
  template <int kStages>
  struct Shared {};
  template <class Arguments>
  __device__ NoScales(const Arguments&, const RowTile&, int) {}
  template <class Shared>
  __device__ __forceinline__ void copy(Shared&, int, int) const {}
};

// kGather: whether rows of A are gathered. kTransposeB: whether the summed dimension is that of B's
// rows. Epilogue: what is done with a tile of D. It may have the loader fill kLoadedStages stages
// more for a tile, which it frees itself. LoadedScales: of A and B, which the loading warpgroup's
// threads copy, each those of one of A's rows.
template <bool kGather_, bool kTransposeB_, int kStages_, class Epilogue_,
          class LoadedScales_ = NoScales>
struct RowMatmul {
  static constexpr bool kGather = kGather_;
  static constexpr bool kTransposeB = kTransposeB_;
  static constexpr int kStages = kStages_;
  using Epilogue = Epilogue_;
  using LoadedScales = LoadedScales_;
  using Arguments = RowMatmulArguments<Epilogue>;
  // Whether threads copy, and not the copy engine alone.
  static constexpr bool kThreadsCopy = kGather || LoadedScales::kCopied;
  static constexpr int kColumns = Epilogue::kColumns;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kBytesA = kTileRows * kDepth * 2;
  static constexpr int kBytesB = kColumns * kDepth * 2;
  // Being multiplied, and at most as many as there are stages being loaded.
  static constexpr int kTiles = kStages + 1;
  static_assert(Epilogue::kLoadedStages < kStages);

  struct Shared {
    struct Stage {
      uint8_t a[kBytesA];
      uint8_t b[kBytesB];
    } stages[kStages];
    typename Epilogue::Shared epilogue[2];
    typename LoadedScales::template Shared<kStages> scales;
    uint64_t full[kStages], empty[kStages];
    RowTile tiles[kTiles];
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert(sizeof(typename Shared::Stage) % 1024 == 0);
};

template <class Matmul>
__device__ __forceinline__ void load_b(const typename Matmul::Arguments& arguments,
                                       typename Matmul::Shared& shared, int stage,
                                       const RowTile& tile, int depth) {
  uint64_t* full = &shared.full[stage];
  uint8_t* b = shared.stages[stage].b;
  if constexpr (Matmul::kTransposeB) {
#pragma unroll
    for (int chunk = 0; chunk < Matmul::kColumns / kChunk; ++chunk) {
      load_box(b + chunk * kDepth * 128, &arguments.b, full,
               tile.column_tile * Matmul::kColumns + chunk * kChunk, depth, tile.expert);
    }
  } else {
    constexpr int kHalf = Matmul::kColumns / 2;
    const int first = tile.column_tile * Matmul::Epilogue::kColumnStep;
    load_box(b, &arguments.b, full, depth, first, tile.expert);
    load_box(b + kHalf * 128, &arguments.b, full, depth, first + arguments.second_half,
             tile.expert);
  }
}

// The row whose scales this thread copies. Rows of other experts are not stored; any will do that
// can be read.
__device__ __forceinline__ int row_of_thread(const RowTile& tile) {
  return min(tile.first_row + int(threadIdx.x % kWarpgroup), tile.end_row - 1);
}

// Tells the multiplying warpgroups of tiles, before their first stages.
template <class Matmul>
class TileWriter {
 public:
  __device__ __forceinline__ void write(typename Matmul::Shared& shared, const RowTile& tile) {
    if (threadIdx.x % kWarpgroup == 0) shared.tiles[turn_] = tile;
    if (++turn_ == Matmul::kTiles) turn_ = 0;
  }

  // There is none any more.
  __device__ __forceinline__ void end(typename Matmul::Shared& shared,
                                      const Ring<Matmul::kStages>& ring) {
    write(shared, {.expert = kNoExpert});
    barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    uint64_t* full = &shared.full[ring.stage];
    if (threadIdx.x % kWarpgroup == 0) barrier_arrive(full);
    if constexpr (Matmul::kThreadsCopy) barrier_arrive(full);
  }

 private:
  static constexpr int kNoExpert = -1;
  int turn_ = 0;
};

template <class Matmul>
class TileReader {
 public:
  RowTile tile;

  // By a warp. The tile's first stage is there afterwards.
  __device__ __forceinline__ bool next(typename Matmul::Shared& shared,
                                       const Ring<Matmul::kStages>& ring) {
    barrier_wait(&shared.full[ring.stage], ring.parity);
    const RowTile read = shared.tiles[turn_];
    if (++turn_ == Matmul::kTiles) turn_ = 0;
    // The same in all threads of a warp, which the compiler has to be told.
    tile.expert = __shfl_sync(~0u, read.expert, 0);
    tile.first_row = __shfl_sync(~0u, read.first_row, 0);
    tile.end_row = __shfl_sync(~0u, read.end_row, 0);
    tile.column_tile = __shfl_sync(~0u, read.column_tile, 0);
    return tile.expert >= 0;
  }

 private:
  int turn_ = 0;
};

// The stages that a tile's epilogue takes, by a warpgroup.
template <class Matmul>
__device__ __forceinline__ void load_for_epilogue(const typename Matmul::Arguments& arguments,
                                                  typename Matmul::Shared& shared,
                                                  Ring<Matmul::kStages>& ring,
                                                  const RowTile& tile) {
  for (int piece = 0; piece < Matmul::Epilogue::kLoadedStages; ++piece, ring.advance()) {
    barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    uint64_t* full = &shared.full[ring.stage];
    if (threadIdx.x % kWarpgroup == 0) {
      Matmul::Epilogue::load(arguments.epilogue, &shared.stages[ring.stage], full, tile, piece);
    }
    barrier_arrive(full);
  }
}

// By a warpgroup where threads copy, else by a warp.
template <class Matmul>
__device__ void load_tiles(const typename Matmul::Arguments& arguments,
                           typename Matmul::Shared& shared) {
  Ring<Matmul::kStages> ring;
  TileWriter<Matmul> writer;
  RowTiles tiles(arguments.groups, arguments.column_tiles);
  for (RowTile tile; tiles.next(tile);) {
    writer.write(shared, tile);
    const typename Matmul::LoadedScales scales(arguments, tile, row_of_thread(tile));
    for (int depth = 0; depth < arguments.depth; depth += kDepth, ring.advance()) {
      barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      uint64_t* full = &shared.full[ring.stage];
      if (threadIdx.x % kWarpgroup == 0) {
        barrier_expect(full, Matmul::kBytesA + Matmul::kBytesB);
        load_box(shared.stages[ring.stage].a, &arguments.a, full, depth, tile.first_row, 0);
        load_b<Matmul>(arguments, shared, ring.stage, tile, depth);
      }
      __syncwarp();
      scales.copy(shared.scales, ring.stage, depth / kDepth);
      if constexpr (Matmul::kThreadsCopy) barrier_arrive_after_copies(full);
    }
    if constexpr (Matmul::Epilogue::kLoadedStages > 0) {
      static_assert(Matmul::kThreadsCopy);
      load_for_epilogue<Matmul>(arguments, shared, ring, tile);
    }
  }
  writer.end(shared, ring);
}

// By a warpgroup: eight threads copy the 128 bytes of a row, each thread a part of eight rows.
template <class Matmul>
__device__ void gather_tiles(const typename Matmul::Arguments& arguments,
                             typename Matmul::Shared& shared) {
  constexpr int kPasses = kTileRows / 16;
  const GatheredRows& rows = arguments.gathered;
  const int thread = threadIdx.x % kWarpgroup;
  const int row = thread / 8, part = thread % 8;
  const uint32_t place = row * 128 + ((part ^ (row % 8)) * 16);
  Ring<Matmul::kStages> ring;
  TileWriter<Matmul> writer;
  RowTiles tiles(arguments.groups, arguments.column_tiles);
  RowTile tile, next;
  bool more = tiles.next(next);
  int slots[kPasses], own_slot = 0;
  const auto find_slots = [&] {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      slots[pass] = rows.slot(min(next.first_row + 16 * pass + row, next.end_row - 1));
    }
    if constexpr (Matmul::LoadedScales::kCopied) own_slot = rows.slot(row_of_thread(next));
  };
  if (more) find_slots();
  while (more) {
    tile = next;
    writer.write(shared, tile);
    const uint4* sources[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      sources[pass] = reinterpret_cast<const uint4*>(rows.row(rows.token(slots[pass]))) + part;
    }
    const typename Matmul::LoadedScales scales(arguments, tile, rows.token(own_slot));
    more = tiles.next(next);
    if (more) find_slots();  // while this tile's rows are on their way
    for (int depth = 0; depth < arguments.depth; depth += kDepth, ring.advance()) {
      barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      if (thread == 0) {
        barrier_expect(&shared.full[ring.stage], Matmul::kBytesB);
        load_b<Matmul>(arguments, shared, ring.stage, tile, depth);
      }
      const uint32_t a = shared_address(shared.stages[ring.stage].a) + place;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        copy_16_bytes(a + pass * 16 * 128, sources[pass] + depth / 8);
      }
      scales.copy(shared.scales, ring.stage, depth / kDepth);
      barrier_arrive_after_copies(&shared.full[ring.stage]);
    }
    if constexpr (Matmul::Epilogue::kLoadedStages > 0) {
      load_for_epilogue<Matmul>(arguments, shared, ring, tile);
    }
  }
  writer.end(shared, ring);
}

// By a warpgroup, of 64 rows.
template <class Matmul>
__device__ void multiply_tiles(const typename Matmul::Arguments& arguments,
                               typename Matmul::Shared& shared, int warpgroup) {
  using Epilogue = typename Matmul::Epilogue;
  constexpr int kStages = Matmul::kStages;
  const int steps = arguments.depth / kDepth;
  Ring<kStages> ring;
  Epilogue epilogue(arguments.epilogue, shared.epilogue[warpgroup], warpgroup);
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
      continue;
    }
    epilogue.begin(tile, first_row, valid_rows);
    float sums[Matmul::kColumns / 2];
    int released = ring.stage;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      // Threads' copies are ordinary writes, the tensor cores' reads are not.
      if constexpr (Matmul::kGather) fence_shared_for_async();
      const uint64_t a = descriptor<Swizzle::k128>(
          shared_address(shared.stages[ring.stage].a + warpgroup * 64 * 128));
      const uint64_t b =
          descriptor<Swizzle::k128>(shared_address(shared.stages[ring.stage].b), kDepth * 128);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        wgmma<false, Matmul::kTransposeB>(sums, advance(a, k * 32),
                                          advance(b, k * (Matmul::kTransposeB ? 16 * 128 : 32)),
                                          step > 0 || k > 0);
      }
      wgmma_commit();
      if constexpr (Epilogue::kLoadedStages > 0) {
        if (step == 0) {
          epilogue.free_stages(shared.empty);
          epilogue.load_factors();
        }
      }
      wgmma_wait<1>();
      if (step > 0) {
        barrier_arrive(&shared.empty[released]);
        released = ring.stage;
      }
    }
    wgmma_wait<0>();
    hold(sums);
    barrier_arrive(&shared.empty[released]);
    if constexpr (Epilogue::kLoadedStages > 0) {
      epilogue.finish(sums, tile, first_row, valid_rows, shared, ring);
    } else {
      epilogue.finish(sums, tile, first_row, valid_rows);
    }
  }
  epilogue.end();
}

// All threads synchronise in it. Every thread that multiplies reads a stage, and frees it.
template <class Matmul>
__device__ __forceinline__ void prepare_row_matmul(typename Matmul::Shared& shared) {
  prepare_stages(shared.full, shared.empty, Matmul::kThreadsCopy ? kWarpgroup + 1 : 1,
                 2 * kWarpgroup);
}

// By the first warpgroup.
template <class Matmul>
__device__ __forceinline__ void load_row_matmul(const typename Matmul::Arguments& arguments,
                                                typename Matmul::Shared& shared) {
  if constexpr (Matmul::kGather) {
    gather_tiles<Matmul>(arguments, shared);
  } else if (Matmul::kThreadsCopy || threadIdx.x < kWarp) {
    load_tiles<Matmul>(arguments, shared);
  }
}

template <class Matmul>
__global__ void __launch_bounds__(Matmul::kThreads, 1)
    row_matmul_kernel(const __grid_constant__ typename Matmul::Arguments arguments) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Matmul::Shared*>(memory);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  prepare_row_matmul<Matmul>(shared);
  if (warpgroup == 0) {
    give_registers<40>();
    load_row_matmul<Matmul>(arguments, shared);
  } else {
    take_registers<232>();
    multiply_tiles<Matmul>(arguments, shared, warpgroup - 1);
  }
}

}  // namespace megatron_kanana::sm90

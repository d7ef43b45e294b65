// Tiles of 128 x 128 numbers quantised to 8 bits in both orders, in one pass: a tile's numbers stay
// in registers, 8 x 8 a thread, from the search for the largest to both casts.
#pragma once

#include "fp8_quantization.cuh"

namespace megatron_kanana {

// Of two numbers bf16 each, the larger magnitude, with a sign that means nothing. A NaN is less
// than any number, as it is to fmaxf.
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  uint32_t found;
  asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
  return found;
}

__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000);
}

__device__ __forceinline__ uint32_t join(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, 0x5410);
}

// A tile of bytes by column, each column's in 16 pieces of 8 rows. Piece p of column c lies at
// place p ^ (c / 8) of the column. What writes has 16 threads that hold the same piece of 16
// columns that are 8 apart: their places differ, and places are pairs of banks. What reads has 8
// threads with the 128 bytes of one column, which are all banks; the two pieces of its 16 bytes lie
// side by side, the other way round where c / 8 is odd.
class alignas(16) Transposition {
 public:
  static constexpr int kPiece = 8, kPieces = kScaleBlock / kPiece, kPairs = kPieces / 2;
  static constexpr int kThreads = kPieces * kPieces;

  // Eight rows of column `i` of a patch; `row` and `column` count patches.
  __device__ __forceinline__ void put(uint2 rows, int row, int column, int i) {
    pieces_[(column * kPiece + i) * kPieces + (row ^ column)] = rows;
  }

  // By all threads: columns as rows of `width` bytes.
  __device__ __forceinline__ void store(uint8_t* to, int64_t width) const {
#pragma unroll
    for (int i = 0; i < kScaleBlock * kPairs / kThreads; ++i) {
      const int own = i * kThreads + static_cast<int>(threadIdx.x);
      *reinterpret_cast<uint4*>(to + own / kPairs * width + own % kPairs * 16) =
          get(own / kPairs, own % kPairs);
    }
  }

 private:
  // Sixteen rows of a column of the tile, from row 16 * pair on.
  __device__ __forceinline__ uint4 get(int column, int pair) const {
    const int swizzle = column / kPiece;
    const uint4 both =
        reinterpret_cast<const uint4*>(pieces_)[column * kPairs + (pair ^ (swizzle / 2))];
    return swizzle % 2 == 0 ? both : make_uint4(both.z, both.w, both.x, both.y);
  }

  uint2 pieces_[kScaleBlock * kPieces];
};

// A thread's 8 x 8 numbers: a word has those of two columns. A warp has two rows of patches.
struct Patch {
  static constexpr int kSize = Transposition::kPiece, kWords = kSize / 2;
  static constexpr int kPatches = Transposition::kPieces;  // along each side of a tile
  static constexpr int kThreads = Transposition::kThreads;
  static constexpr int kBlocksAtOnce = 4;  // of a multiprocessor

  uint32_t rows[kSize][kWords];

  __device__ __forceinline__ static int row() { return threadIdx.x / kPatches; }
  __device__ __forceinline__ static int column() { return threadIdx.x % kPatches; }
  // Of the patch in a tile of rows of `width` elements.
  __device__ __forceinline__ static int64_t place(int64_t width) {
    return row() * kSize * width + column() * kSize;
  }

  __device__ __forceinline__ void load(const __nv_bfloat16* tile, int64_t width) {
    const __nv_bfloat16* from = tile + place(width);
#pragma unroll
    for (auto& each : rows) {
      const uint4 loaded = __ldcs(reinterpret_cast<const uint4*>(from));
      each[0] = loaded.x, each[1] = loaded.y, each[2] = loaded.z, each[3] = loaded.w;
      from += width;
    }
  }

  // `scaled(i, pair)`: two numbers of row i, ready to be rounded.
  template <class Scaled>
  __device__ __forceinline__ void store_rows(uint8_t* tile, int64_t width,
                                             const Scaled& scaled) const {
    uint8_t* const to = tile + place(width);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      uint32_t pairs[kWords];
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const float2 both = scaled(i, rows[i][word]);
        pairs[word] = pack_e4m3(both.x, both.y);
      }
      *reinterpret_cast<uint2*>(to + i * width) = {join(pairs[0], pairs[1]),
                                                   join(pairs[2], pairs[3])};
    }
  }

  // `scaled(word, pair)`: two numbers of columns 2 * word and 2 * word + 1.
  template <class Scaled>
  __device__ __forceinline__ void put_columns(Transposition& tile, const Scaled& scaled) const {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint32_t low[kWords], high[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const float2 first = scaled(word, rows[2 * i][word]);
        const float2 second = scaled(word, rows[2 * i + 1][word]);
        low[i] = pack_e4m3(first.x, second.x);
        high[i] = pack_e4m3(first.y, second.y);
      }
      tile.put({join(low[0], low[1]), join(low[2], low[3])}, row(), column(), 2 * word);
      tile.put({join(high[0], high[1]), join(high[2], high[3])}, row(), column(), 2 * word + 1);
    }
  }
};

}  // namespace megatron_kanana

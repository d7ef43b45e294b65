// Which keys a query sees, and which queries see a key: always one run of positions, whose bounds
// never fall from a row to the next, so the first and last row of a tile bound all others.
#pragma once

#include <cstdint>

namespace megatron_kanana::sm90 {

struct Run {
  int begin;
  int end;
};

struct AttentionMask {
  int sequence;
  bool causal;
  const int32_t* begins;  // of this sample's documents; null where it is one
  const int32_t* ends;

  __device__ AttentionMask(int sequence_, int batch, int sample, bool causal_,
                           const int32_t* documents)
      : sequence(sequence_),
        causal(causal_),
        begins(documents == nullptr ? nullptr : documents + int64_t(sample) * sequence_),
        ends(documents == nullptr ? nullptr : begins + int64_t(batch) * sequence_) {}

  // Empty for rows past the end, and for padding (whose document begins where it ends).
  __device__ Run keys_of(int query) const {
    if (query >= sequence) return {0, 0};
    Run run = document_of(query);
    if (causal) run.end = min(run.end, query + 1);
    return run;
  }

  __device__ Run queries_of(int key) const {
    if (key >= sequence) return {0, 0};
    Run run = document_of(key);
    if (causal) run.begin = key;
    return run;
  }

  // Tiles of `kColumns` that rows [first, first + kRows) touch.
  template <int kRows, int kColumns>
  __device__ Run key_tiles(int first) const {
    return tiles<kColumns>(keys_of(first), keys_of(min(first + kRows, sequence) - 1));
  }

  template <int kRows, int kColumns>
  __device__ Run query_tiles(int first) const {
    return tiles<kColumns>(queries_of(first), queries_of(min(first + kRows, sequence) - 1));
  }

 private:
  __device__ Run document_of(int position) const {
    if (begins == nullptr) return {0, sequence};
    // Whatever the caller gives, no tile is outside the sequence.
    return {max(__ldg(begins + position), 0), min(__ldg(ends + position), sequence)};
  }

  template <int kColumns>
  __device__ static Run tiles(Run first, Run last) {
    return {first.begin / kColumns, (last.end + kColumns - 1) / kColumns};
  }
};

}  // namespace megatron_kanana::sm90

// One target's pieces of flash attention, for the choice among targets when the program runs.
#pragma once

#include "flash_attention.h"

namespace megatron_kanana::cpu {

struct FlashAttentionTarget {
  const char* name;
  int64_t column;  // queries of a piece of the forward pass
  int64_t (*forward_scratch)(const ForwardTensors&);
  int64_t (*backward_scratch)(const FlashAttentionProblem&, const BackwardTensors&);
  void (*forward_piece)(const FlashAttentionProblem&, const ForwardTensors&, int64_t, float*);
  void (*backward_piece)(const FlashAttentionProblem&, const BackwardTensors&, int64_t, float*);
};

extern const FlashAttentionTarget kAvx512;
extern const FlashAttentionTarget kAvx2;
extern const FlashAttentionTarget kBaseline;

}  // namespace megatron_kanana::cpu

// Flash attention for any processor, with vectors of 16 bytes.
#include "flash_attention_target.h"

#define MEGATRON_KANANA_CPU_TARGET baseline
#define MEGATRON_KANANA_VECTOR 4
#define MEGATRON_KANANA_ROWS 4
#include "flash_attention_backward.h"
#include "flash_attention_forward.h"

namespace megatron_kanana::cpu {

const FlashAttentionTarget kBaseline = {"baseline",
                                        baseline::kColumn,
                                        baseline::forward_scratch,
                                        baseline::backward_scratch,
                                        baseline::forward_piece,
                                        baseline::backward_piece};

}  // namespace megatron_kanana::cpu

// Flash attention for x86 processors with AVX2.
#include "flash_attention_target.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define MEGATRON_KANANA_CPU_TARGET avx2
#define MEGATRON_KANANA_VECTOR 8
#define MEGATRON_KANANA_ROWS 4
#include "flash_attention_backward.h"
#include "flash_attention_forward.h"

namespace megatron_kanana::cpu {

const FlashAttentionTarget kAvx2 = {"avx2",
                                    avx2::kColumn,
                                    avx2::forward_scratch,
                                    avx2::backward_scratch,
                                    avx2::forward_piece,
                                    avx2::backward_piece};

}  // namespace megatron_kanana::cpu
#endif

// Flash attention for x86 processors with AVX-512.
#include "flash_attention_target.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,fma")
#define MEGATRON_KANANA_CPU_TARGET avx512
#define MEGATRON_KANANA_VECTOR 16
#define MEGATRON_KANANA_ROWS 8
#include "flash_attention_backward.h"
#include "flash_attention_forward.h"

namespace megatron_kanana::cpu {

const FlashAttentionTarget kAvx512 = {"avx512",
                                      avx512::kColumn,
                                      avx512::forward_scratch,
                                      avx512::backward_scratch,
                                      avx512::forward_piece,
                                      avx512::backward_piece};

}  // namespace megatron_kanana::cpu
#endif

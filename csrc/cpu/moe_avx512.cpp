// Mixture of experts for x86 processors with AVX-512.
#include "moe_target.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,fma")
#define MEGATRON_KANANA_CPU_TARGET avx512
#define MEGATRON_KANANA_VECTOR 16
#define MEGATRON_KANANA_ROWS 8
#include "moe_experts_pieces.h"
#include "moe_routing_pieces.h"

MEGATRON_KANANA_MOE_TARGET(kMoeAvx512, avx512)
#endif

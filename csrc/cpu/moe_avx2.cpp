// Mixture of experts for x86 processors with AVX2.
#include "moe_target.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define MEGATRON_KANANA_CPU_TARGET avx2
#define MEGATRON_KANANA_VECTOR 8
#define MEGATRON_KANANA_ROWS 4
#include "moe_experts_pieces.h"
#include "moe_routing_pieces.h"

MEGATRON_KANANA_MOE_TARGET(kMoeAvx2, avx2)
#endif

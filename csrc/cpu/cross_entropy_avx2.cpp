// Cross-entropy for x86 processors with AVX2.
#include "cross_entropy_target.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define MEGATRON_KANANA_CPU_TARGET avx2
#define MEGATRON_KANANA_VECTOR 8
#include "cross_entropy_pieces.h"

MEGATRON_KANANA_CROSS_ENTROPY_TARGET(kCrossEntropyAvx2, avx2)
#endif

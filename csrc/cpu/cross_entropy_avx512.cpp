// Cross-entropy for x86 processors with AVX-512.
#include "cross_entropy_target.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,fma")
#define MEGATRON_KANANA_CPU_TARGET avx512
#define MEGATRON_KANANA_VECTOR 16
#include "cross_entropy_pieces.h"

MEGATRON_KANANA_CROSS_ENTROPY_TARGET(kCrossEntropyAvx512, avx512)
#endif

// Cross-entropy for any processor, with vectors of 16 bytes.
#include "cross_entropy_target.h"

#define MEGATRON_KANANA_CPU_TARGET baseline
#define MEGATRON_KANANA_VECTOR 4
#include "cross_entropy_pieces.h"

MEGATRON_KANANA_CROSS_ENTROPY_TARGET(kCrossEntropyBaseline, baseline)

// Mixture of experts for any processor, with vectors of 16 bytes.
#include "moe_target.h"

#define MEGATRON_KANANA_CPU_TARGET baseline
#define MEGATRON_KANANA_VECTOR 4
#define MEGATRON_KANANA_ROWS 4
#include "moe_experts_pieces.h"
#include "moe_routing_pieces.h"

MEGATRON_KANANA_MOE_TARGET(kMoeBaseline, baseline)

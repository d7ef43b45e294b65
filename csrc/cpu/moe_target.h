// One target's pieces of the mixture of experts, for the choice among targets when the program
// runs.
#pragma once

#include "moe_experts.h"
#include "moe_routing.h"

namespace megatron_kanana::cpu {

struct MoeTarget {
  int64_t column;  // columns of a panel
  int64_t gradient_rows;
  int64_t (*routing_scratch)(const RoutingProblem&);
  void (*route_piece)(const RoutingProblem&, const float*, const float*, float*, int32_t*, int64_t,
                      float*);
  void (*route_backward_piece)(const RoutingProblem&, const float*, const float*, const int32_t*,
                               float*, int64_t, float*);
  int64_t (*experts_scratch)(const ExpertsProblem&);
  void (*pack_piece)(const ExpertsProblem&, int64_t, int64_t, const ExpertWeights&, const Panels&,
                     int64_t);
  void (*experts_forward_block)(const ExpertsProblem&, const RowBlock&, const Panels&,
                                const ForwardRows&, float*);
  void (*experts_backward_block)(const ExpertsProblem&, const RowBlock&, const Panels&,
                                 const BackwardRows&, float*);
  void (*weight_gradient_block)(const ExpertsProblem&, int64_t, int64_t, int64_t,
                                const BackwardRows&, const WeightGradients&, int64_t, float*);
  void (*combine_tokens)(const ExpertsProblem&, const int32_t*, const float*, const float*, void*,
                         int64_t, int64_t, float*);
};

extern const MoeTarget kMoeAvx512;
extern const MoeTarget kMoeAvx2;
extern const MoeTarget kMoeBaseline;

}  // namespace megatron_kanana::cpu

// Defines `name` with what the included files have for the target.
#define MEGATRON_KANANA_MOE_TARGET(name, target)          \
  namespace megatron_kanana::cpu {                        \
  const MoeTarget name = {target::kColumn,                \
                          target::kGradientRows,          \
                          target::routing_scratch,        \
                          target::route_piece,            \
                          target::route_backward_piece,   \
                          target::experts_scratch,        \
                          target::pack_piece,             \
                          target::experts_forward_block,  \
                          target::experts_backward_block, \
                          target::weight_gradient_block,  \
                          target::combine_tokens};        \
  }

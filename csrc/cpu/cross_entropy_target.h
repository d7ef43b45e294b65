// One target's rows of cross-entropy, for the choice among targets when the program runs.
#pragma once

#include "cross_entropy.h"

namespace megatron_kanana::cpu {

struct CrossEntropyTarget {
  void (*statistics)(const CrossEntropyProblem&, float*, int64_t);
  void (*gradient)(const CrossEntropyProblem&, const float*, const float*, int64_t);
};

extern const CrossEntropyTarget kCrossEntropyAvx512;
extern const CrossEntropyTarget kCrossEntropyAvx2;
extern const CrossEntropyTarget kCrossEntropyBaseline;

}  // namespace megatron_kanana::cpu

// Defines `name` with what the included files have for the target.
#define MEGATRON_KANANA_CROSS_ENTROPY_TARGET(name, target)           \
  namespace megatron_kanana::cpu {                                   \
  const CrossEntropyTarget name = {target::cross_entropy_statistics, \
                                   target::cross_entropy_gradient};  \
  }

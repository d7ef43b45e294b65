// The choice of experts and its gradient. Included once for each target, see vectors.h.
#pragma once

#include "moe_routing.h"
#include "vectors.h"

namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET {

// The key of what must not be chosen: less than that of any number.
constexpr int32_t kExcluded = INT32_MIN;

// Integers in the order of the numbers; NaN is the largest, as in torch, and zeros are equal.
MEGATRON_KANANA_INLINE Ints order_keys(Floats x) {
  const Ints bits = (Ints)(x + 0.0f);
  const Ints keys = bits ^ ((bits >> 31) & 0x7fffffff);
  return x == x ? keys : Ints{} + 0x7fc00000;
}

MEGATRON_KANANA_INLINE int32_t order_key(float x) { return order_keys(broadcast(x))[0]; }

inline int64_t padded_to_vectors(int64_t count) {
  return (count + kVector - 1) / kVector * kVector;
}

// Place of the largest of `count` keys, a multiple of kVector; of equals the first.
MEGATRON_KANANA_INLINE int64_t first_largest(const int32_t* keys, int64_t count) {
  Ints lane_numbers;
#pragma GCC unroll 16
  for (int lane = 0; lane < kVector; ++lane) lane_numbers[lane] = lane;
  Ints best = load(keys), places = lane_numbers;
  for (int64_t i = kVector; i < count; i += kVector) {
    const Ints candidates = load(keys + i);
    const Ints better = candidates > best;
    best = better ? candidates : best;
    places = better ? lane_numbers + static_cast<int32_t>(i) : places;
  }
  int32_t largest = best[0], place = places[0];
#pragma GCC unroll 16
  for (int lane = 1; lane < kVector; ++lane) {
    if (best[lane] > largest || (best[lane] == largest && places[lane] < place)) {
      largest = best[lane];
      place = places[lane];
    }
  }
  return place;
}

// Memory of one thread, cut from its scratch; each part a multiple of vectors.
struct RoutingScratch {
  float* logits;  // those of the token's experts in the backward pass
  float* scores;
  float* choice;        // scores + bias
  int32_t* keys;        // of the choice
  int32_t* group_keys;  // of the groups' worth
  float* end;

  RoutingScratch(const RoutingProblem& problem, float* scratch)
      : logits(scratch),
        scores(logits + padded_to_vectors(problem.experts)),
        choice(scores + padded_to_vectors(problem.experts)),
        keys(reinterpret_cast<int32_t*>(choice + padded_to_vectors(problem.experts))),
        group_keys(keys + padded_to_vectors(problem.experts)),
        end(reinterpret_cast<float*>(group_keys + padded_to_vectors(problem.groups))) {}
};

inline int64_t routing_scratch(const RoutingProblem& problem) {
  float* const none = nullptr;
  return RoutingScratch(problem, none).end - none;
}

// The sum of the best two of a group's choices, or its only one.
inline float worth_of_group(const float* choice, const int32_t* keys, int64_t count) {
  int64_t first = 0, second = -1;
  for (int64_t i = 1; i < count; ++i) {
    if (keys[i] > keys[first]) {
      second = first;
      first = i;
    } else if (second < 0 || keys[i] > keys[second]) {
      second = i;
    }
  }
  return second < 0 ? choice[first] : choice[first] + choice[second];
}

// Excludes the experts of all groups but the best.
inline void keep_best_groups(const RoutingProblem& problem, const RoutingScratch& scratch) {
  const int64_t count = problem.experts / problem.groups;
  const int64_t padded_groups = padded_to_vectors(problem.groups);
  for (int64_t group = 0; group < padded_groups; ++group) {
    scratch.group_keys[group] = group < problem.groups
                                    ? order_key(worth_of_group(scratch.choice + group * count,
                                                               scratch.keys + group * count, count))
                                    : kExcluded;
  }
  // Those that are kept are the ones excluded from being chosen again.
  for (int64_t i = 0; i < problem.groups_per_token; ++i) {
    scratch.group_keys[first_largest(scratch.group_keys, padded_groups)] = kExcluded;
  }
  for (int64_t group = 0; group < problem.groups; ++group) {
    if (scratch.group_keys[group] == kExcluded) continue;
    for (int64_t i = 0; i < count; ++i) scratch.keys[group * count + i] = kExcluded;
  }
}

inline void route_token(const RoutingProblem& problem, const float* logits, const float* bias,
                        float* weights, int32_t* chosen, const RoutingScratch& scratch) {
  const int64_t padded = padded_to_vectors(problem.experts);
  __builtin_memcpy(scratch.logits, logits, problem.experts * sizeof(float));
  for (int64_t i = 0; i < padded; i += kVector) {
    const Floats scores = sigmoid(load(scratch.logits + i));
    store(scratch.scores + i, scores);
    store(scratch.choice + i, scores);
  }
  if (bias != nullptr) {
    for (int64_t i = 0; i < problem.experts; ++i) scratch.choice[i] += bias[i];
  }
  for (int64_t i = 0; i < padded; i += kVector) {
    store(scratch.keys + i, order_keys(load(scratch.choice + i)));
  }
  for (int64_t i = problem.experts; i < padded; ++i) scratch.keys[i] = kExcluded;
  if (problem.groups > 1) keep_best_groups(problem, scratch);
  float sum = 1e-20f;
  for (int64_t slot = 0; slot < problem.slots; ++slot) {
    const int64_t expert = first_largest(scratch.keys, padded);
    scratch.keys[expert] = kExcluded;
    chosen[slot] = static_cast<int32_t>(expert);
    weights[slot] = scratch.scores[expert];
    sum += weights[slot];
  }
  const float factor = problem.slots > 1 ? problem.scaling_factor / sum : problem.scaling_factor;
  for (int64_t slot = 0; slot < problem.slots; ++slot) weights[slot] *= factor;
}

inline void route_backward_token(const RoutingProblem& problem, const float* grad_weights,
                                 const float* logits, const int32_t* chosen, float* grad_logits,
                                 const RoutingScratch& scratch) {
  for (int64_t slot = 0; slot < problem.slots; ++slot) {
    scratch.logits[slot] = logits[chosen[slot]];
  }
  for (int64_t i = 0; i < problem.slots; i += kVector) {
    store(scratch.scores + i, sigmoid(load(scratch.logits + i)));
  }
  float factor = problem.scaling_factor, mean = 0.0f;
  if (problem.slots > 1) {
    float sum = 1e-20f;
    for (int64_t slot = 0; slot < problem.slots; ++slot) {
      sum += scratch.scores[slot];
      mean += grad_weights[slot] * scratch.scores[slot];
    }
    mean /= sum;
    factor /= sum;
  }
  __builtin_memset(grad_logits, 0, problem.experts * sizeof(float));
  for (int64_t slot = 0; slot < problem.slots; ++slot) {
    const float score = scratch.scores[slot];
    grad_logits[chosen[slot]] = factor * (grad_weights[slot] - mean) * score * (1.0f - score);
  }
}

inline int64_t end_of_piece(const RoutingProblem& problem, int64_t piece) {
  const int64_t end = (piece + 1) * kRoutingTokens;
  return end < problem.tokens ? end : problem.tokens;
}

inline void route_piece(const RoutingProblem& problem, const float* logits, const float* bias,
                        float* weights, int32_t* chosen, int64_t piece, float* scratch_data) {
  const RoutingScratch scratch(problem, scratch_data);
  // What lies behind the last expert is computed with, and excluded.
  __builtin_memset(scratch_data, 0, (scratch.end - scratch_data) * sizeof(float));
  for (int64_t token = piece * kRoutingTokens; token < end_of_piece(problem, piece); ++token) {
    route_token(problem, logits + token * problem.experts, bias, weights + token * problem.slots,
                chosen + token * problem.slots, scratch);
  }
}

inline void route_backward_piece(const RoutingProblem& problem, const float* grad_weights,
                                 const float* logits, const int32_t* chosen, float* grad_logits,
                                 int64_t piece, float* scratch_data) {
  const RoutingScratch scratch(problem, scratch_data);
  __builtin_memset(scratch_data, 0, (scratch.end - scratch_data) * sizeof(float));
  for (int64_t token = piece * kRoutingTokens; token < end_of_piece(problem, piece); ++token) {
    route_backward_token(problem, grad_weights + token * problem.slots,
                         logits + token * problem.experts, chosen + token * problem.slots,
                         grad_logits + token * problem.experts, scratch);
  }
}

}  // namespace megatron_kanana::cpu::MEGATRON_KANANA_CPU_TARGET

// torch.library schema of flash attention.
#include <torch/library.h>

#include "flash_attention_checks.h"

namespace megatron_kanana {

TORCH_LIBRARY_FRAGMENT(megatron_kanana, library) {
  library.def(
      "flash_attention_forward(Tensor query, Tensor key, Tensor value, float softmax_scale, "
      "bool causal, Tensor? documents, Tensor(a!)? max_logits) -> (Tensor out, Tensor logsumexp)");
  library.def(
      "flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor logsumexp, float softmax_scale, bool causal, Tensor? documents, "
      "bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}

}  // namespace megatron_kanana

"""Forward and backward passes beside transformers' DeepseekV3ForCausalLM.

Argument: JSON, a list of [length, settings such as "model.q_lora_rank=null"]; prints a list of
results. Weights are random; every parameter's gradient of the mean cross-entropy is compared.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from megatron_kanana import device
from megatron_kanana.config import Environment, Settings, load_settings
from megatron_kanana.config.schema import ModelSettings
from megatron_kanana.kernels.backend import REFERENCE
from tests.launch import CONFIG_DIR

Tensors = dict[str, torch.Tensor]


def hugging_face_config(model: ModelSettings) -> Any:
    """The same architecture in transformers' terms."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.yarn_factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": model.yarn_factor,
            "beta_fast": model.yarn_beta_fast,
            "beta_slow": model.yarn_beta_slow,
            "mscale": model.yarn_mscale,
            "mscale_all_dim": model.yarn_mscale_all_dim,
            "original_max_position_embeddings": model.yarn_original_context,
        }
    return transformers.DeepseekV3Config(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_heads,
        n_shared_experts=model.num_shared_experts,
        n_routed_experts=model.num_experts,
        routed_scaling_factor=model.routed_scaling_factor,
        kv_lora_rank=model.kv_lora_rank,
        q_lora_rank=model.q_lora_rank,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        qk_nope_head_dim=model.qk_nope_head_dim,
        n_group=model.num_expert_groups,
        topk_group=model.num_expert_groups_per_token,
        num_experts_per_tok=model.num_experts_per_token,
        first_k_dense_replace=model.num_dense_layers,
        norm_topk_prob=True,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=rope,
        rope_interleave=True,
        max_position_embeddings=4096,
        num_mtp_layers=0,
        attn_implementation="eager",
    )


def hugging_face_names(ours: Tensors, model: ModelSettings) -> Tensors:
    """Our tensors (weights or gradients of one process) under transformers' names and shapes."""
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for index in range(model.num_layers):
        is_moe = index >= model.num_dense_layers
        layer = (f"decoder.layers.{index}", f"model.layers.{index}")
        theirs |= hugging_face_layer_names(ours, *layer, model, is_moe=is_moe)
    return theirs


def hugging_face_layer_names(
    ours: Tensors, source: str, target: str, model: ModelSettings, *, is_moe: bool
) -> Tensors:
    """One transformer layer's tensors, from names below `source` to names below `target`."""
    theirs = {
        f"{target}.input_layernorm.weight": ours[f"{source}.input_layernorm.weight"],
        f"{target}.post_attention_layernorm.weight": ours[f"{source}.pre_mlp_layernorm.weight"],
    }
    attention = {
        "linear_q_proj": "q_proj",
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    for name, other in attention.items():
        if (key := f"{source}.self_attention.{name}.weight") in ours:
            theirs[f"{target}.self_attn.{other}.weight"] = ours[key]
    if not is_moe:
        return theirs | _feed_forward(ours, f"{source}.mlp", f"{target}.mlp")
    theirs[f"{target}.mlp.gate.weight"] = ours[f"{source}.mlp.router.weight"]
    if (key := f"{source}.mlp.router.expert_bias") in ours:
        theirs[f"{target}.mlp.gate.e_score_correction_bias"] = ours[key]
    for name in ("gate_up", "down"):
        theirs[f"{target}.mlp.experts.{name}_proj"] = ours[f"{source}.mlp.experts.{name}"]
    shared = "mlp.shared_experts"
    if model.num_shared_experts:
        theirs |= _feed_forward(ours, f"{source}.{shared}", f"{target}.{shared}")
    else:  # transformers keeps projections of width zero
        empty = torch.empty(0, model.hidden_size)
        for name, tensor in {"gate": empty, "up": empty, "down": empty.T}.items():
            theirs[f"{target}.{shared}.{name}_proj.weight"] = tensor
    return theirs


def _feed_forward(ours: Tensors, source: str, target: str) -> Tensors:
    gate, up = ours[f"{source}.linear_fc1.weight"].chunk(2)
    down = ours[f"{source}.linear_fc2.weight"]
    return {
        f"{target}.gate_proj.weight": gate,
        f"{target}.up_proj.weight": up,
        f"{target}.down_proj.weight": down,
    }


def randomize(model: Any) -> None:
    """Random matrices, gains around one, expert biases that change who is chosen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("expert_bias"):
                tensor.copy_(0.1 * noise)
            elif tensor.dim() >= 2:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
            elif "norm" in name:
                tensor.copy_(1.0 + 0.1 * noise)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of theirs."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def compare(settings: Settings, where: device.Device, length: int) -> dict[str, float]:
    """Largest difference of the logits, their spread, and the worst gradient error."""
    from megatron_kanana.model.builder import gpt_model
    from megatron_kanana.model.megatron_config import transformer_config

    ours = gpt_model(settings, transformer_config(settings, where), REFERENCE)
    randomize(ours)
    weights = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    theirs = transformers.DeepseekV3ForCausalLM(hugging_face_config(settings.model))
    theirs.load_state_dict(hugging_face_names(weights, settings.model), strict=True)

    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(settings.model.vocab_size, (2, length + 1), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(length).expand(2, -1)
    our_logits, their_logits = ours(inputs, positions, None), theirs(inputs).logits
    for logits in (our_logits, their_logits):
        F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()
    our_gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in ours.named_parameters()
    }
    mapped = hugging_face_names(our_gradients, settings.model)
    errors = {
        name: relative_error(mapped[name], parameter.grad)
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None and parameter.numel()
    }
    return {
        "logit_difference": float((our_logits - their_logits).detach().abs().max()),
        "logit_spread": float(their_logits.detach().std()),
        "gradient_error": max(errors.values()),
        "gradients": len(errors),
    }


def small_settings(overrides: list[str]) -> Settings:
    """The tests' small model in fp32 on a CPU, without the losses that transformers lacks."""
    common = [
        *("experiment=small", "run_name=unsaved", "device=cpu", "data.sequence_length=64"),
        *("model.balance_loss_coefficient=0", "model.z_loss_coefficient=0"),
    ]
    return load_settings([*common, *overrides], Environment(), str(CONFIG_DIR))


if __name__ == "__main__":
    cases = [(length, small_settings(overrides)) for length, overrides in json.loads(sys.argv[1])]
    here = device.prepare_device(cases[0][1], Environment())
    device.initialize_process_groups(cases[0][1], here)
    print(json.dumps([compare(settings, here, length) for length, settings in cases]))
    device.destroy_process_groups()

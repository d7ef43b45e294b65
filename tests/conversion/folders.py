"""Hugging Face folders with random weights, made without the project's own writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.448,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16",
}

LAYER = {
    "input_layernorm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
    "self_attn.q_a_proj.weight": (24, 32),
    "self_attn.q_a_layernorm.weight": (24,),
    "self_attn.q_b_proj.weight": (48, 24),
    "self_attn.kv_a_proj_with_mqa.weight": (24, 32),
    "self_attn.kv_a_layernorm.weight": (16,),
    "self_attn.kv_b_proj.weight": (56, 16),
    "self_attn.o_proj.weight": (32, 24),
}
MOE = {
    "mlp.gate.weight": (4, 32),
    "mlp.gate.e_score_correction_bias": (4,),
    "mlp.shared_experts.gate_proj.weight": (32, 32),
    "mlp.shared_experts.up_proj.weight": (32, 32),
    "mlp.shared_experts.down_proj.weight": (32, 32),
    **{
        f"mlp.experts.{expert}.{name}.weight": shape
        for expert in range(4)
        for name, shape in {
            "gate_proj": (16, 32),
            "up_proj": (16, 32),
            "down_proj": (32, 16),
        }.items()
    },
}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (300, 32),
    "model.norm.weight": (32,),
    "lm_head.weight": (300, 32),
    **{f"model.layers.0.{name}": shape for name, shape in LAYER.items()},
    "model.layers.0.mlp.gate_proj.weight": (48, 32),
    "model.layers.0.mlp.up_proj.weight": (48, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 48),
    **{f"model.layers.1.{name}": shape for name, shape in {**LAYER, **MOE}.items()},
}
MTP_SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.2.enorm.weight": (32,),
    "model.layers.2.hnorm.weight": (32,),
    "model.layers.2.eh_proj.weight": (32, 64),
    "model.layers.2.shared_head.norm.weight": (32,),
    **{f"model.layers.2.{name}": shape for name, shape in {**LAYER, **MOE}.items()},
}
"""Of one layer; the copies of embedding and head are beside them in a file."""

Tensors = dict[str, torch.Tensor]


def random_tensors(seed: int = 0, *, mtp: bool = False) -> Tensors:
    """Random bf16 weights, the router's bias in fp32 as published."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**SHAPES, **(MTP_SHAPES if mtp else {})}
    tensors = {
        name: torch.randn(shape, generator=generator).to(
            torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        )
        for name, shape in shapes.items()
    }
    if mtp:
        tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def write_folder(
    folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, shards: int = 3
) -> Path:
    """Write config.json and safetensors with an index, as a download has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder

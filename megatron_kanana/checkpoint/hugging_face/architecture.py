"""The model in Hugging Face's `config.json`, and in our settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_kanana.config.compose import settings_of_model
from megatron_kanana.config.problems import ConfigurationError
from megatron_kanana.config.schema import ModelSettings, Settings
from megatron_kanana.config.wording import one_line

from .problems import ConversionError

CONFIG_FILE = "config.json"

# Ours -> theirs. All are asked for: transformers would take DeepSeek-V3's value for one left out.
FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "ffn_hidden_size": "intermediate_size",
    "num_dense_layers": "first_k_dense_replace",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "num_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "routed_scaling_factor": "routed_scaling_factor",
    "num_expert_groups": "n_group",
    "num_expert_groups_per_token": "topk_group",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
}

# What the architecture here always does; a file may say so, or say nothing.
FIXED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_interleave": True,
    "tie_word_embeddings": False,
}

# Ours -> theirs, inside the description of the rotary embedding.
YARN_FIELDS = {
    "yarn_factor": "factor",
    "yarn_original_context": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
}
LONGEST_DEFAULT_SEQUENCE = 4096


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a folder's config.json.

    Raises:
        ConversionError: there is none, or it is not a JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            [f"{path} does not exist: give a folder with a Hugging Face model"]
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConversionError(
            [f"{path} is not JSON ({one_line(error)}): download it again"]
        ) from None
    if not isinstance(config, dict):
        raise ConversionError([f"{path} holds no JSON object: download it again"])
    return config


def model_settings(
    config: Mapping[str, Any], name: str, num_mtp_layers: int, parallel: Mapping[str, int]
) -> Settings:
    """Default settings around the model that a config.json describes.

    Args:
        config: contents of config.json.
        name: what to call the model.
        num_mtp_layers: multi-token prediction layers to have, whatever the file says.
        parallel: sizes of the layout, to be checked against the model's.

    Raises:
        ConversionError: with everything about the model that cannot be taken.
    """
    model_type = config.get("model_type")
    if model_type != "deepseek_v3":
        raise ConversionError(
            [f"config.json: model_type = {model_type!r} is another architecture; deepseek_v3 fits"]
        )
    problems = [
        f"config.json: {theirs} is missing" for theirs in FIELDS.values() if theirs not in config
    ]
    problems += [
        f"config.json: {theirs} = {config[theirs]!r} cannot be taken, only {value!r}"
        for theirs, value in FIXED.items()
        if config.get(theirs, value) not in (value, None)
    ]
    heads, key_value_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if key_value_heads not in (heads, None):
        problems.append(
            f"config.json: num_key_value_heads = {key_value_heads} cannot be taken: latent"
            f" attention has as many as num_attention_heads = {heads}"
        )
    rotary = _rotary_settings(config, problems)
    problems += [
        f"config.json: {name.replace('_', ' ')} = {value!r} is no number"
        for name, value in rotary.items()
        if not isinstance(value, (int, float))
    ]
    if problems:
        raise ConversionError(problems)
    # transformers writes null for "no shared experts" and for "no groups".
    nothing = {"num_shared_experts": 0, "num_expert_groups": 1, "num_expert_groups_per_token": 1}
    fields = {
        ours: nothing.get(ours) if config[theirs] is None else config[theirs]
        for ours, theirs in FIELDS.items()
    }
    context = int(rotary["yarn_original_context"] * rotary["yarn_factor"])
    try:
        return settings_of_model(
            {"name": name, **fields, **rotary, "num_mtp_layers": num_mtp_layers},
            {
                "parallel": dict(parallel),
                "data": {"sequence_length": min(context, LONGEST_DEFAULT_SEQUENCE)},
            },
        )
    except ConfigurationError as error:
        raise ConversionError(
            [
                f"{problem.setting} = {problem.value}: {problem.reason}; {problem.remedy}"
                for problem in error.problems
            ]
        ) from None


def _rotary_settings(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Our rotary settings, from transformers 5's `rope_parameters` or the older two fields."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        problems.append(f"config.json: the rotary embedding {rope!r:.40} is no JSON object")
        return {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    ours: dict[str, Any] = {
        "rotary_base": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "yarn_factor": 1.0,
        "yarn_original_context": config.get("max_position_embeddings", 4096),
    }
    if kind == "default":
        return ours
    if kind != "yarn":
        problems.append(f"config.json: rope type = {kind!r} cannot be taken, only default and yarn")
        return ours
    missing = [name for name in ("factor", "mscale", "mscale_all_dim") if not rope.get(name)]
    problems += [f"config.json: YaRN's {name} is missing or 0; give it" for name in missing]
    if rope.get("attention_factor") is not None:
        problems.append("config.json: YaRN's attention_factor cannot be taken; give mscale")
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, **rope}
    for mine, theirs in YARN_FIELDS.items():
        if theirs in defaults:
            ours[mine] = defaults[theirs]
    return ours


def hugging_face_config(
    model: ModelSettings, dtype: str, end_of_text: int | None
) -> dict[str, Any]:
    """The contents of config.json for a model.

    The rotary embedding is described as DeepSeek-V3's published files do, which every version of
    transformers and the inference servers read.

    Args:
        model: the model's settings.
        dtype: format of most weights, such as 'bfloat16'.
        end_of_text: token that ends a document, if the tokenizer has one.
    """
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": dtype,
        **{theirs: getattr(model, ours) for ours, theirs in FIELDS.items()},
        **FIXED,
        "num_key_value_heads": model.num_attention_heads,
        "num_nextn_predict_layers": model.num_mtp_layers,
        "max_position_embeddings": int(model.yarn_original_context * model.yarn_factor),
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "use_cache": True,
    }
    if model.yarn_factor > 1:
        fields = {theirs: getattr(model, ours) for ours, theirs in YARN_FIELDS.items()}
        config["rope_scaling"] = {"type": "yarn", **fields}
    return config

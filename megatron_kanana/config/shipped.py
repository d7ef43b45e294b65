"""Settings of the shipped models, whatever tokenizer and data there are."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from .compose import CONFIG_DIR
from .fields import build
from .problems import Problem
from .schema import ModelSettings


def shipped_model(name: str, *overrides: str) -> ModelSettings:
    """Settings of `model=name`, with overrides such as "model.num_layers=8"."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("config", overrides=[f"model={name}", *overrides])
    values = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(values, dict)
    problems: list[Problem] = []
    model = build(ModelSettings, {str(key): value for key, value in values.items()}, problems)
    assert model is not None, problems
    return model

"""Typed settings, where they come from, and the checks on them."""

from .compose import load_settings, saved_settings
from .environment import Environment, detect_environment, resolve_device, resolve_precision
from .problems import ConfigurationError, Problem, tell
from .saved import (
    checkpoint_to_start_from,
    checkpoint_tokenizer,
    read_settings,
    write_settings,
)
from .schema import Settings

__all__ = [
    "ConfigurationError",
    "Environment",
    "Problem",
    "Settings",
    "checkpoint_to_start_from",
    "checkpoint_tokenizer",
    "detect_environment",
    "load_settings",
    "read_settings",
    "resolve_device",
    "resolve_precision",
    "saved_settings",
    "tell",
    "write_settings",
]

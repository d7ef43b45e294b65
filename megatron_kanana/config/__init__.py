"""Typed settings, their checks, and their translation to megatron-core."""

from .compose import load_settings, saved_settings
from .environment import Environment, detect_environment, resolve_device, resolve_precision
from .problems import ConfigurationError, Problem
from .schema import Settings

__all__ = [
    "ConfigurationError",
    "Environment",
    "Problem",
    "Settings",
    "detect_environment",
    "load_settings",
    "resolve_device",
    "resolve_precision",
    "saved_settings",
]

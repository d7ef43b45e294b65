"""What a configuration needs, computed without building anything."""

from .parameters import ParameterCount, count_parameters

__all__ = ["ParameterCount", "count_parameters"]

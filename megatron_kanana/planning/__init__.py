"""What a configuration needs, computed without building anything: sizes, memory, time, layouts."""

from .parameters import ParameterCount, count_parameters

__all__ = ["ParameterCount", "count_parameters"]

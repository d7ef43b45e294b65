"""Bad configurations, each by what is bad about it."""

from .case import CUDA_MACHINE, ONE_CPU, Bad, world
from .data import DATA
from .launch import LAUNCH
from .precision import PRECISION
from .sizes import SIZES

BAD = {**LAUNCH, **PRECISION, **SIZES, **DATA}

__all__ = ["BAD", "CUDA_MACHINE", "ONE_CPU", "Bad", "world"]

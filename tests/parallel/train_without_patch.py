"""The main job with one of the patches left out: PATCH [arguments of the main job]."""

from __future__ import annotations

import functools
import sys

import megatron_kanana.device.process
from megatron_kanana import train
from megatron_kanana.device.patches import apply_patches

if __name__ == "__main__":
    disabled, *arguments = sys.argv[1:]
    module = vars(megatron_kanana.device.process)
    module["apply_patches"] = functools.partial(apply_patches, disabled=[disabled])
    sys.exit(train.main(arguments))

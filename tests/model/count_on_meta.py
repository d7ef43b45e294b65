"""Builds models without memory for their weights and prints how many parameters they have."""

from __future__ import annotations

import sys
from typing import Any

import torch

from megatron_kanana import device
from megatron_kanana.config import Environment, load_settings
from megatron_kanana.config.shipped import shipped_model
from megatron_kanana.kernels.backend import REFERENCE


def main(names: list[str]) -> None:
    """Print a line for each model: its parameters, those of the routed experts, and Muon's.

    A name may have overrides behind it: "kanana_2_tiny,model.num_layers=8".
    """
    settings = load_settings(["run_name=unsaved"], Environment())
    where = device.prepare_device(settings, Environment())
    device.initialize_process_groups(settings, where)

    from megatron_kanana.model.builder import gpt_model
    from megatron_kanana.model.megatron_config import transformer_config
    from megatron_kanana.optimizer.logical_matrices import rule_of

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("meta")  # where megatron-core puts weights
    for name in names:
        settings.model = shipped_model(*name.split(","))
        with torch.device("meta"):
            model = gpt_model(settings, transformer_config(settings, where), REFERENCE)
        sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
        routed = sum(
            size
            for key, size in sizes.items()
            if key.startswith("decoder.") and ".mlp.experts." in key
        )
        muon = sum(size for key, size in sizes.items() if rule_of(key).muon)
        print(name, sum(sizes.values()), routed, muon)
    device.destroy_process_groups()


if __name__ == "__main__":
    main(sys.argv[1:])

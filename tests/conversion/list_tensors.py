"""Prints the tensors of models' sharded state dicts; argument: JSON of settings by name."""

from __future__ import annotations

import json
import sys

from megatron_kanana import device
from megatron_kanana.config import Environment
from megatron_kanana.kernels.backend import REFERENCE
from tests.model.beside_transformers import small_settings


def main(models: dict[str, list[str]]) -> None:
    """Print, for each model, names and whole shapes."""
    first = small_settings([])
    where = device.prepare_device(first, Environment())
    device.initialize_process_groups(first, where)

    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_kanana.model.builder import gpt_model
    from megatron_kanana.model.initialization import shards
    from megatron_kanana.model.megatron_config import transformer_config

    listed: dict[str, dict[str, list[int]]] = {}
    for name, overrides in models.items():
        settings = small_settings(overrides)
        model = gpt_model(settings, transformer_config(settings, where), REFERENCE)
        listed[name] = {
            shard.key: list(shard.global_shape)
            for entry in model.sharded_state_dict().values()
            for shard in shards(entry)
            if isinstance(shard, ShardedTensor)
        }
    device.destroy_process_groups()
    print(json.dumps(listed))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""Settings to look at the model of a checkpoint: generation and evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from .compose import saved_settings
from .environment import Environment
from .problems import ConfigurationError, Problem
from .saved import SETTINGS_FILE, checkpoint_tokenizer, glance, read_settings
from .schema import Settings

ONE_PROCESS = (
    "parallel.tensor_parallel_size=1",
    "parallel.context_parallel_size=1",
    "parallel.pipeline_parallel_size=1",
    "parallel.virtual_pipeline_stages=1",
    "parallel.embeddings_count_as_layers=false",
    "parallel.expert_parallel_size=1",
    "parallel.expert_tensor_parallel_size=1",
    "parallel.token_dispatcher=alltoall",
)


def settings_of_saved_model(
    checkpoint: Path, overrides: Sequence[str], environment: Environment
) -> Settings:
    """The settings a checkpoint was made with, for its weights alone, in a layout of its own.

    The layout is one process unless `overrides` say otherwise; its tokenizer is the checkpoint's.
    The run's data, checkpoints and folders play no part, nor do layers for multi-token prediction.

    Args:
        checkpoint: folder of the checkpoint.
        overrides: words such as `parallel.tensor_parallel_size=2` or `device=cpu`.
        environment: the machine and the launch to check against.

    Raises:
        ConfigurationError: with all the problems found.
    """
    if damages := glance(checkpoint):
        remedy = f"name a step_… folder that holds {SETTINGS_FILE} and all the rest"
        reason = f"is not a whole checkpoint: {'; '.join(map(str, damages))}"
        raise ConfigurationError([Problem("checkpoint", checkpoint, reason, remedy)])
    try:
        saved = read_settings(checkpoint)
        tokenizer = checkpoint_tokenizer(checkpoint)
    except OSError as error:
        remedy = f"name a step_… folder that holds {SETTINGS_FILE} and a tokenizer"
        problem = Problem("checkpoint", checkpoint, f"is not a whole checkpoint ({error})", remedy)
        raise ConfigurationError([problem]) from error
    folder = tempfile.gettempdir()  # nothing is written there
    unused = (
        "model.num_mtp_layers=0",
        "data.blend=[]",
        "data.blend_changes=[]",
        "data.evaluation_sets=[]",
        "data.conversations=[]",
        "data.held_out_conversations=[]",
        f"data.cache_dir='{folder}'",
        f"output_dir='{folder}'",
        "checkpoint.directory=null",
        "checkpoint.local_directory=null",
        "checkpoint.local_save_interval=0",
        "checkpoint.load=null",
        "checkpoint.load_what=everything",
        "checkpoint.reset_expert_bias=false",
        "checkpoint.resume=true",
        "schedule.evaluation_interval=0",
        f"schedule.global_batch_size={environment.world_size}",
        "schedule.batch_size_changes=[]",
        "schedule.micro_batch_size=1",
        "precision.fp8=none",  # single tokens are no multiples of what its products take
        "precision.experts=bf16",
        "precision.expert_weight_gradients=bf16",
        "precision.kept_activations=bf16",
        "precision.output_layer=bf16",
    )
    return saved_settings(
        saved,
        [*ONE_PROCESS, *unused, f"data.tokenizer='{tokenizer}'", *overrides],
        environment,
    )

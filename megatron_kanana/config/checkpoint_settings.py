"""Settings of checkpoints: saving, keeping, verifying, loading."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import setting


@dataclass(kw_only=True)
class CheckpointSettings:
    """Saving, keeping, verifying and loading."""

    directory: str | None = setting(
        None, help="where checkpoints go; null is 'checkpoints' in the run's folder"
    )
    save_interval: int = setting(
        0, help="steps between checkpoints; 0 saves only at the end", minimum=0
    )
    keep_last: int = setting(2, help="newest checkpoints kept", minimum=1)
    keep_every: int = setting(
        0, help="checkpoints at multiples of this step are kept for good; 0 keeps none", minimum=0
    )
    asynchronous: bool = setting(True, help="write while training goes on")
    on_save_failure: str = setting(
        "continue",
        help="what follows a checkpoint that cannot be saved: continue trains on and saves at the"
        " next interval, up to max_failed_saves in a row; stop ends the run. A failure at the end"
        " of a run ends it with status 74 in either case",
        choices=("continue", "stop"),
    )
    max_failed_saves: int = setting(
        3, help="checkpoints in a row that may fail before the run stops", minimum=1
    )
    save_time_limit: float | None = setting(
        None,
        help="minutes after which a checkpoint written in the background counts as failed; null"
        " waits for ever",
        above=0.0,
    )
    local_directory: str | None = setting(
        None,
        help="folder on a disk of each node, where every process keeps its own state beside the"
        " checkpoints, for quick restarts of the same processes; null keeps none",
    )
    local_save_interval: int = setting(0, help="steps between those; 0 saves none there", minimum=0)
    verify: bool = setting(
        True,
        help="compare every file of a checkpoint with its checksum before anything is loaded;"
        " false looks at sizes alone",
    )
    resume: bool = setting(
        True,
        help="go on from this run's newest whole checkpoint; false refuses to, if there is one",
    )
    load: str | None = setting(
        None, help="checkpoint to start from when this run has none of its own"
    )
    load_what: str = setting(
        "everything",
        help="what is taken of checkpoint.load: everything goes on where it was; weights, or"
        " weights_and_optimizer with the optimizer's moments, begin a run of its own at step 0",
        choices=("everything", "weights", "weights_and_optimizer"),
    )
    reset_expert_bias: bool = setting(
        False,
        help="a run that begins at step 0 with a checkpoint's weights sets the biases that balance"
        " the experts to zero; model.expert_bias_update_rate=0 then freezes them there"
        " (arXiv 2608.20061)",
    )

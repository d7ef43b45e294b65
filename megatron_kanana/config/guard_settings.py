"""Settings of the group `guards`: what a run does about numbers that cannot be right."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import setting


@dataclass(kw_only=True)
class GuardSettings:
    """Checks of every step before it changes the weights."""

    on_nonfinite: str = setting(
        "skip",
        help="a loss or gradient is not finite: skip leaves the step out; rollback returns to the"
        " newest checkpoint and leaves out the samples since; stop saves and ends the run; ignore"
        " does not look",
        choices=("skip", "rollback", "stop", "ignore"),
    )
    on_spike: str = setting(
        "report",
        help="the loss rose far above the last steps': report only says so; skip, rollback, stop"
        " and ignore are as for on_nonfinite",
        choices=("report", "skip", "rollback", "stop", "ignore"),
    )
    spike_window: int = setting(
        128,
        help="last losses that a loss is compared with; a quarter of them must be known",
        minimum=8,
    )
    spike_threshold: float = setting(
        10.0,
        help="robust standard deviations (1.4826 times the median absolute deviation) above the"
        " median of the window that make a loss a spike",
        above=0.0,
    )
    spike_minimum_rise: float = setting(
        0.05,
        help="a loss below median x (1 + this) is no spike, however quiet the window",
        minimum=0.0,
    )
    rollback_steps: int = setting(
        0,
        help="a rollback goes back at least this many steps: before a spike is seen, weights may"
        " have been on their way to it for a while",
        minimum=0,
    )
    max_interventions: int = setting(
        3,
        help="steps that may be skipped or rolled back within intervention_window steps; one more"
        " stops the run",
        minimum=0,
    )
    intervention_window: int = setting(
        200, help="steps over which max_interventions counts", minimum=1
    )
    trace_layers: bool = setting(
        True,
        help="keep whether each layer's output and gradient were finite, to name the layer of a"
        " fault that does not repeat",
    )
    recheck_interval: int = setting(
        0,
        help="steps between checks for silent corruption: each process computes its gradients"
        " twice and compares them; costs two passes; 0 never",
        minimum=0,
    )
    recheck_tolerance: float = setting(
        0.0,
        help="relative difference of the two that is allowed; above 0 where kernels are not"
        " deterministic",
        minimum=0.0,
    )
    on_mismatch: str = setting(
        "stop",
        help="the two differ: stop saves and ends the run, naming the processes; report goes on",
        choices=("stop", "report"),
    )

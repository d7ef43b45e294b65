"""One measured figure, and what it was measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kanana.config.shipped import shipped_model

from .architecture import Architecture
from .calibration import TRANSFORMER_ENGINE, Implementation
from .layer_times import Job
from .layout import Layout
from .machines import MACHINES, Machine

GIB = 2**30


@dataclass(frozen=True)
class Observation:
    """One measured figure, and what it was measured on.

    Attributes:
        name: what was run.
        quantity: 'peak memory', 'memory between steps' and 'activations' in GiB; 'passes' (forward
            and backward passes of a step), 'update' and 'step' (both) in seconds; 'throughput' in
            TFLOP/s of a GPU by the model's count.
        measured: the figure; None where it has not been measured.
        source: where it stands.
        job: what was run.
        optimizer: 'adamw' or 'muon'.
        fp32_gradients: whether gradients were kept in fp32.
        calibrated: the numbers of `calibration` and `machines` that were fitted to this figure.
    """

    name: str
    quantity: str
    measured: float | None
    source: str
    job: Job
    optimizer: str = "adamw"
    fp32_gradients: bool = True
    calibrated: tuple[str, ...] = ()


def one_gpu(machine: str) -> Machine:
    """A GPU of the machines that the slices and the cards were measured on."""
    return dataclasses.replace(MACHINES[machine], host_time=1.0)


def slice_of_30b(
    layers: int,
    sequences: int,
    *,
    machine: str = "h200",
    implementation: Implementation = TRANSFORMER_ENGINE,
    fp8: frozenset[str] = frozenset(),
    microbatches: int = 1,
    recompute: Sequence[str] = (),
) -> Job:
    """The first layers of Kanana-2 30B with embedding and output layer, on one GPU.

    Args:
        sequences: of 4,096 tokens in a microbatch.
    """
    model = shipped_model("kanana_2_30b_a3b", f"model.num_layers={layers}")
    layout = Layout(
        *(1, 1, 1, 1, 1, 1),
        counts_embeddings=False,
        sequence_length=4096,
        micro_batch_size=sequences,
        global_batch_size=sequences * microbatches,
        recompute=frozenset(recompute),
    )
    return Job(Architecture.of(model), layout, one_gpu(machine), implementation, fp8)

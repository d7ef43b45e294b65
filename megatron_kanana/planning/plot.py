"""A picture of the layouts that a search found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .calibration import RESERVED_MEMORY
from .observation import GIB
from .search import Candidate

GROUPS = {
    "attention": ("attention projections", "core attention"),
    "feed-forward": ("routed experts", "shared experts", "dense feed-forward"),
    "output layer and loss": ("output layer and loss",),
    "moving data": ("moving data",),
    "launching": ("launching",),
    "messages": ("messages",),
    "update": ("update", "orthogonalisation"),
    "waiting": ("waiting",),
}
MEMORY = ("weights", "gradients", "optimizer", "activations")


def plot_search(candidates: Sequence[Candidate], path: Path, top: int) -> None:
    """Step time and memory of the fastest layouts, by part, as a PNG.

    Args:
        candidates: fastest first; at least one.
        path: of the picture.
        top: how many to show.
    """
    from matplotlib.figure import Figure

    shown = candidates[:top]
    names = [_name(candidate) for candidate in shown]
    figure = Figure(figsize=(12, 1.5 + 0.35 * len(shown)), layout="constrained")
    times, sizes = figure.subplots(1, 2, sharey=True)
    start = [0.0] * len(shown)
    for group, beginnings in GROUPS.items():
        widths = [
            sum(s for part, s in each.plan.parts.items() if part.startswith(beginnings))
            for each in shown
        ]
        times.barh(names, widths, left=start, label=group)
        start = [left + width for left, width in zip(start, widths, strict=True)]
    times.set_xlabel("seconds of a step")
    fullest = [max(each.plan.memory, key=lambda rank: rank.peak) for each in shown]
    start = [0.0] * len(shown)
    for part in MEMORY:
        widths = [getattr(rank, part) / GIB for rank in fullest]
        sizes.barh(names, widths, left=start, label=part)
        start = [left + width for left, width in zip(start, widths, strict=True)]
    room = shown[0].plan.job.machine.memory_bytes / GIB * (1 - RESERVED_MEMORY)
    sizes.axvline(room, color="black", linestyle=":", label="room")
    sizes.set_xlabel("GiB on the fullest GPU")
    times.invert_yaxis()
    for axes in (times, sizes):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)


def _name(candidate: Candidate) -> str:
    layout = candidate.plan.job.layout
    again = ", recompute" if layout.has_full_recompute else ""
    counted = ", counted" if layout.counts_embeddings else ""
    return (
        f"TP{layout.tensor} PP{layout.pipeline} VP{layout.virtual} EP{layout.expert}"
        f" x{layout.micro_batch_size}{again}{counted}"
    )

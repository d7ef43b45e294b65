"""How activations, and what training adds to them, grow with the width: with and without muP.

python -m benchmarks.coordinate_check --name coordinate_check_cpu

Models of several widths make a few updates on the same text. Before and after them, a fixed batch
goes through the model. Under muP the size of every activation's change is the same at each width;
under the standard parametrisation the wider model's activations change more (Tensor Programs V,
arXiv 2203.03466, figure 5).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .card import RESULTS_DIR, Row, write_card
from .several_runs import (
    PARAMETRIZATIONS,
    OneProcess,
    parametrization_overrides,
    settings_of,
    width_overrides,
)

if TYPE_CHECKING:
    from megatron_kanana.training.run import Run

BASE_HIDDEN_SIZE, BASE_NUM_EXPERTS = 64, 4
PLACES = {
    "embedding": "embedding.word_embeddings",
    "attention of the last layer": "decoder.layers.{last}.self_attention",
    "experts of the last layer": "decoder.layers.{last}.mlp",
    "final norm": "decoder.final_layernorm",
    "logits": "output_layer",
}
"""Modules whose outputs are looked at, by name in the model."""

Sizes = dict[str, dict[str, float]]
"""'before' and 'change' (root mean squares over all elements) for each place."""


def main() -> None:
    """Measure, plot, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="name of the card and of the plot")
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=4, help="updates between the two looks")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common = [
            f"optimizer={options.optimizer}",
            f"optimizer.learning_rate={options.learning_rate}",
        ]
        sizes = measure(options.multiples, options.steps, [*common, f"data.cache_dir={folder}"])
    widths = [BASE_HIDDEN_SIZE * multiple for multiple in options.multiples]
    options.results_dir.mkdir(parents=True, exist_ok=True)
    plot(sizes, widths, options.results_dir / f"{options.name}.png")
    mup, standard = (growth(sizes[name], widths) for name in PARAMETRIZATIONS)
    rows = [
        Row(
            f"{place}, {what}: exponent of its growth with width",
            "1",
            mup[place][what],
            "standard parametrisation",
            standard[place][what],
        )
        for place in PLACES
        for what in ("before", "change")
    ]
    print(write_card(options.name, rows, options.results_dir).read_text())


def measure(
    multiples: Sequence[int], steps: int, overrides: Sequence[str]
) -> dict[str, list[Sizes]]:
    """Sizes by parametrisation, one entry for each width; in this process."""
    settings = {
        name: [
            settings_of(
                [
                    *width_overrides(BASE_HIDDEN_SIZE, BASE_NUM_EXPERTS, multiple),
                    *parametrization_overrides(name, BASE_HIDDEN_SIZE),
                    *_run_overrides(steps),
                    *overrides,
                ]
            )
            for multiple in multiples
        ]
        for name in PARAMETRIZATIONS
    }
    process = OneProcess(settings["muP"][0])
    return {
        name: [_sizes(process.build(of_width), steps) for of_width in of_widths]
        for name, of_widths in settings.items()
    }


def growth(sizes: Sequence[Sizes], widths: Sequence[int]) -> Sizes:
    """Exponents e of sizes that grow as width^e, by least squares; 0 is flat."""
    logs = np.log(widths)
    return {
        place: {
            what: float(np.polyfit(logs, np.log([of[place][what] for of in sizes]), 1)[0])
            for what in ("before", "change")
        }
        for place in PLACES
    }


def _run_overrides(steps: int) -> list[str]:
    return [
        "model.num_layers=2",
        "model.num_experts_per_token=2",
        "model.ffn_hidden_size=256",
        "model.vocab_size=2048",
        "data.sequence_length=64",
        "schedule.global_batch_size=8",
        "schedule.micro_batch_size=8",
        f"schedule.steps={steps}",
        "schedule.warmup_steps=0",
        "schedule.decay_steps=0",
        "schedule.minimum_learning_rate=0",
        "schedule.evaluation_batches=1",
    ]


def _sizes(run: Run, steps: int) -> Sizes:
    """Sizes of the activations of a held-out batch, and of their changes in `steps` updates."""
    from megatron_kanana.training.evaluation import evaluate
    from megatron_kanana.training.run import training_data
    from megatron_kanana.training.step import train_step

    iterators, held_out = training_data(run)
    with _outputs(run) as before:
        evaluate(run, held_out)
    for _ in range(steps):
        train_step(run, iterators)
    with _outputs(run) as after:
        evaluate(run, held_out)
    return {
        place: {"before": _size(output), "change": _size(after[place] - output)}
        for place, output in before.items()
    }


@contextmanager
def _outputs(run: Run) -> Iterator[dict[str, torch.Tensor]]:
    """What the modules of PLACES give meanwhile, by place."""
    from megatron.core.utils import unwrap_model

    model = unwrap_model(run.chunks[0])
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(
            name.format(last=run.settings.model.num_layers - 1)
        ).register_forward_hook(_keeper(outputs, place))
        for place, name in PLACES.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _keeper(outputs: dict[str, torch.Tensor], place: str) -> Any:
    def keep(module: Any, inputs: Any, result: Any) -> None:
        output = result[0] if isinstance(result, tuple) else result
        if place == "logits":  # the layer hands hidden states over where there are labels
            output = torch.nn.functional.linear(inputs[0], module.weight)
        outputs[place] = output.detach().float().clone()

    return keep


def _size(x: torch.Tensor) -> float:
    return math.sqrt(float(x.square().mean()))


def plot(sizes: dict[str, list[Sizes]], widths: Sequence[int], path: Path) -> None:
    """Changes against width, one panel for each parametrisation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(sizes), figsize=(6 * len(sizes), 4.5), sharey=True, layout="constrained"
    )
    for axes, (name, of_widths) in zip(panels, sizes.items(), strict=True):
        for place in PLACES:
            axes.loglog(widths, [of[place]["change"] for of in of_widths], "o-", label=place)
        axes.set_title(name)
        axes.set_xlabel("hidden size")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("change of the activation, root mean square")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PLACES))
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()

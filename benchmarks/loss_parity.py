"""Whether precisions, and megatron-core's own modules, learn alike: loss curves on real text.

python -m benchmarks.loss_parity --name loss_parity_h200 --steps 400

A model of 0.25 billion parameters is trained from the same weights on the same text by each
contender: ours in bf16, ours in fp8, and megatron-core's modules in bf16. Each is trained several
times, every time with the sequences of each batch in another order, which sums their gradients in
another order: what rounding alone does to a final loss is far from small, so means are compared.
AdamW updates fp32 weights; it is torch's, the same for all. Its learning rate rises slowly and
falls to zero, as small differences grow with it. The text is the built-in one, six languages and
Python.

The card is written after every run, and says which were not run: there is a limit of `--seconds`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_kanana.data.builtin import (
    builtin_data,
    language_samples,
    prepare_builtin_data,
    standard_library_sources,
)

from .card import RESULTS_DIR, Row, reason, write_card
from .gradient_cosines import cosine, layer_cosines
from .loss_curves import curve_rows, final_loss, plot_curves
from .step_bench import BUILTIN_VOCABULARY, OURS, Bench, add_settings
from .turns import Clock, Curves, in_turn

MODEL = (
    *("model.hidden_size=1024", "model.num_attention_heads=8", "model.ffn_hidden_size=3072"),
    *("model.num_experts=16", "model.num_experts_per_token=4", "model.num_shared_experts=1"),
    *("model.moe_ffn_hidden_size=512", "model.num_dense_layers=1"),
)
"""Beside 30B's heads, which the kernels for attention are made for."""


@dataclass(frozen=True)
class Batches:
    """Batches of windows of a text, drawn from a seed.

    Attributes:
        tokens: int64 [tokens of the text].
        sequences: of a batch.
        microbatches: into which a batch is cut.
        length: of a sequence.
    """

    tokens: torch.Tensor
    sequences: int
    microbatches: int
    length: int

    def draw(self, step: int, order: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Microbatches of a step: the same sequences in every order."""
        dice = torch.Generator().manual_seed(step)
        last = len(self.tokens) - self.length - 1
        starts = torch.randint(last, (self.sequences,), generator=dice)
        if order:
            dice.manual_seed(step + 1_000_003 * order)
            starts = starts[torch.randperm(self.sequences, generator=dice)]
        windows = self.tokens[starts[:, None] + torch.arange(self.length + 1)]
        for part in windows.chunk(self.microbatches):
            shape = part[:, :-1].shape
            yield {
                "tokens": part[:, :-1].contiguous(),
                "labels": part[:, 1:].contiguous(),
                "loss_mask": torch.ones(shape),
                "position_ids": torch.arange(self.length).expand(shape).contiguous(),
            }


def main(arguments: list[str] | None = None) -> None:
    """Train every contender, and write card and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="write NAME.json and NAME.png")
    parser.add_argument("--output", type=Path, default=RESULTS_DIR, help="folder of the card")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=16, help="of a step")
    parser.add_argument("--microbatches", type=int, default=2, help="of a step")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--runs", type=int, default=4, help="of each contender")
    parser.add_argument("--seconds", type=float, help="time limit, from the parsed command line on")
    parser.add_argument(
        "--precisions",
        nargs="+",
        default=["bf16", "fp8_blockwise"],
        help="ours: groups of `precision`, each perhaps with more settings, 'GROUP NAME=VALUE'",
    )
    parser.add_argument("--peer-precisions", nargs="*", default=["bf16"], help="megatron-core's")
    add_settings(parser)
    options = parser.parse_args(arguments)
    clock = Clock(options.seconds)
    options.model, options.vocabulary = "kanana_2_30b_a3b", BUILTIN_VOCABULARY
    options.set = [*MODEL, *options.set]
    bench = Bench(options)
    bench.build()
    batches = Batches(
        text_tokens(), options.sequences, options.microbatches, options.sequence_length
    )
    rows = gradient_rows(bench, batches)
    print(*rows, sep="\n", flush=True)

    def write(curves: Curves, not_run: list[str]) -> None:
        whole = {name: runs for name, runs in curves.items() if runs}
        base = f"{OURS}, {options.precisions[0]}"
        said = curve_rows(whole, base) if base in whole else []
        path = write_card(options.name, [*rows, *said], options.output, [*bench.notes, *not_run])
        if whole:
            plot_curves(whole, options.output / f"{options.name}.png")
        print(f"{path}: {clock.left():.0f} s left", flush=True)

    train_all(bench, batches, options, clock, write)


def text_tokens() -> torch.Tensor:
    """The built-in text by the built-in tokenizer, int64 [tokens]."""
    from megatron_kanana.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        data = builtin_data(Path(folder), BUILTIN_VOCABULARY)
        prepare_builtin_data(data, BUILTIN_VOCABULARY)
        tokenizer = load_tokenizer(data.tokenizer)
        texts = itertools.chain(language_samples(), standard_library_sources(2**23))
        encoded = tokenizer.encode_batch(list(texts))
    joined = [torch.tensor([*document, tokenizer.eod]) for document in encoded]
    return torch.cat(joined)


def gradient_rows(bench: Bench, batches: Batches) -> list[Row]:
    """Smallest cosines of gradients with the first contender's, at the start.

    A contender that fails is one no more, and leaves the reason.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    assert bench.shared is not None
    for name, contender in list(bench.contenders.items()):
        bench.shared.zero_gradients()
        try:
            for batch in batches.draw(0):
                contender.forward_backward(iter([batch]))
        except Exception as error:  # whatever a peer raises, the others run
            del bench.contenders[name]
            bench.notes.append(f"not run: {name}: {reason(error)}")
            print(bench.notes[-1], flush=True)
            continue
        found[name] = bench.shared.gradients()
    base, *others = found
    rows = []
    for name in others:
        layers = layer_cosines(found[name], found[base])
        parameters = {each: cosine(g, found[base][each]) for each, g in found[name].items()}
        for what, cosines in (("layer's gradient", layers), ("gradient", parameters)):
            worst = min(cosines, key=lambda each: cosines[each])
            rows.append(Row(f"{name}: smallest cosine of a {what} ({worst})", "", cosines[worst]))
    return rows


def train_all(
    bench: Bench,
    batches: Batches,
    options: argparse.Namespace,
    clock: Clock,
    after_each: Callable[[Curves, list[str]], None],
) -> None:
    """Train every contender from the same weights, in turn; `after_each` is told what there is."""
    assert bench.shared is not None
    parameters = list(bench.shared.parameters.values())
    initial = [parameter.detach().clone() for parameter in parameters]

    def run(name: str, order: int) -> list[float]:
        for parameter, start in zip(parameters, initial, strict=True):
            parameter.data.copy_(start)
        curve = train(bench, name, batches, order, options, clock)
        print(f"{name}: loss {curve[0]:.4f} -> {final_loss(curve):.4f}", flush=True)
        return curve

    in_turn(list(bench.contenders), options.runs, run, clock, after_each)


def train(
    bench: Bench,
    name: str,
    batches: Batches,
    order: int,
    options: argparse.Namespace,
    clock: Clock,
) -> list[float]:
    """Mean loss of each step.

    Raises:
        OutOfTimeError: before the last step.
    """
    shared, contender = bench.shared, bench.contenders[name]
    assert shared is not None
    parameters = list(shared.parameters.values())
    masters = [torch.nn.Parameter(p.detach().float().clone()) for p in parameters]
    optimizer = torch.optim.AdamW(
        masters, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    losses: list[float] = []
    for step in range(options.steps):
        clock.check(f"{step} of {options.steps} steps done")
        shared.zero_gradients()
        contender.chunks[0].set_is_first_microbatch()
        of_step = [
            contender.forward_backward(iter([batch]))[0] for batch in batches.draw(step, order)
        ]
        factor = learning_rate_factor(step, options.steps)
        optimizer.param_groups[0]["lr"] = options.learning_rate * factor
        update(parameters, masters, optimizer, batches.microbatches)
        losses.append(float(torch.stack(of_step).mean()))
    return losses


def learning_rate_factor(step: int, steps: int) -> float:
    """Up over the first fifth of the steps, down to zero over the last half."""
    return min(1.0, (step + 1) / max(1, steps // 5), (steps - step) / max(1, steps // 2))


@torch.no_grad()
def update(
    parameters: Sequence[torch.nn.Parameter],
    masters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    microbatches: int,
) -> None:
    """AdamW on fp32 weights with gradients clipped to a norm of 1, and their copies in bf16."""
    for parameter, master in zip(parameters, masters, strict=True):
        master.grad = parameter.main_grad / microbatches  # type: ignore[attr-defined]
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    for parameter, master in zip(parameters, masters, strict=True):
        parameter.data.copy_(master)


if __name__ == "__main__":
    main()

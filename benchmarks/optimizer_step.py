"""The optimizer's share of a step: MuonClip on a slice of kanana_2_30b_a3b, on one GPU.

python -m benchmarks.optimizer_step --name optimizer_step_h100

Forward and backward passes are timed on microbatches of random tokens and counted as often as a
step of 262,144 tokens has them; the update is timed whole: clipping, Muon, AdamW, QK-Clip.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data

from .card import RESULTS_DIR, Row, write_card
from .several_runs import OneProcess, settings_of

STEP_TOKENS = 2**18
MICROBATCHES = 4  # of one timing
WARM_UP, TIMED = 2, 5
BUILTIN_VOCABULARY = 4096


def main() -> None:
    """Time every optimizer and write the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=2, help="of a microbatch")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--optimizers", nargs="+", default=["muon", "adamw"])
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for optimizer in options.optimizers:
            # In a process of its own, which leaves no memory behind.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows += pool.submit(measure, optimizer, options, Path(folder)).result()
    print(write_card(options.name, rows, options.results_dir).read_text())


def measure(optimizer: str, options: argparse.Namespace, folder: Path) -> list[Row]:
    """Rows about one optimizer."""
    settings = settings_of(
        [
            *("model=kanana_2_30b_a3b", f"model.num_layers={options.layers}", "precision=bf16"),
            f"model.vocab_size={BUILTIN_VOCABULARY}",
            *(f"optimizer={optimizer}", f"data.cache_dir={folder}"),
            f"data.sequence_length={options.sequence_length}",
            f"schedule.micro_batch_size={options.sequences}",
            f"schedule.global_batch_size={options.sequences * MICROBATCHES}",
        ]
    )
    tokenizer = builtin_data(folder, BUILTIN_VOCABULARY)
    prepare_builtin_data(tokenizer, BUILTIN_VOCABULARY)
    # The tokens are random, so any tokenizer will do beside the model's own vocabulary.
    settings.data.tokenizer, settings.model.vocab_size = str(tokenizer.tokenizer), 128256
    run = OneProcess(settings).build(settings)

    from megatron_kanana.training.step import run_schedule

    iterators = [random_microbatches(settings)]

    def passes() -> None:
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
        run_schedule(run, iterators, MICROBATCHES, forward_only=False)

    def update() -> None:
        if run.qk_clip is not None:
            run.qk_clip.max_logits = run.attention_logits.reduce()
        run.optimizer.step()

    parameters = sum(p.numel() for chunk in run.chunks for p in chunk.parameters())
    print(f"{optimizer}: {parameters / 1e9:.2f}e9 parameters", flush=True)
    times: dict[Callable[[], None], list[float]] = {passes: [], update: []}
    run.scheduler.step(increment=1)
    for _ in range(WARM_UP + TIMED):  # the update follows each timing of the passes, as in a run
        for part, seconds in times.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            part()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        print(
            f"{optimizer}: {MICROBATCHES} microbatches {times[passes][-1]:.3f} s,"
            f" update {times[update][-1]:.3f} s",
            flush=True,
        )
    pass_time, update_time = (statistics.median(part[WARM_UP:]) for part in times.values())
    microbatches = STEP_TOKENS / (options.sequences * options.sequence_length)
    whole = pass_time / MICROBATCHES * microbatches
    return [
        Row(f"{optimizer}: parameters", "1e9", parameters / 1e9),
        Row(f"{optimizer}: passes of a step of {STEP_TOKENS:,} tokens", "s", whole, runs=TIMED),
        Row(f"{optimizer}: update", "s", update_time, runs=TIMED),
        Row(f"{optimizer}: update / passes", "%", 100 * update_time / whole, runs=TIMED),
        Row(f"{optimizer}: peak memory", "GiB", torch.cuda.max_memory_allocated() / 2**30),
    ]


def random_microbatches(settings: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatches of random tokens, without end."""
    size = (settings.schedule.micro_batch_size, settings.data.sequence_length)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in itertools.count():
        tokens = torch.randint(
            settings.model.vocab_size, (size[0], size[1] + 1), generator=generator
        )
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(size),
            "position_ids": torch.arange(size[1]).expand(size).contiguous(),
        }


if __name__ == "__main__":
    main()

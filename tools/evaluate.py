"""Perplexity of a checkpoint's model on held-out text.

    python tools/evaluate.py CHECKPOINT --data held_out.jsonl data/corpus

Documents are put end to end, each with its end-of-document token, and cut into windows; every
token but the first of a window is predicted. Any layout will do:

    torchrun --nproc-per-node 2 tools/evaluate.py CHECKPOINT --data FILE \\
        parallel.tensor_parallel_size=2
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, TaskID

from megatron_kanana import device
from megatron_kanana.config import (
    ConfigurationError,
    Settings,
    detect_environment,
    tell,
)
from megatron_kanana.config.saved_model import settings_of_saved_model
from megatron_kanana.data.held_out import HeldOutText, read_held_out
from megatron_kanana.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from megatron_kanana.training.perplexity import HeldOutLoss


def main() -> int:
    """Check everything, load, predict, print."""
    options = parse_arguments()
    environment = detect_environment()
    batches = [
        f"schedule.micro_batch_size={options.batch_size}",
        f"schedule.global_batch_size={options.batch_size * environment.world_size}",
    ]
    if options.sequence_length is not None:
        batches.append(f"data.sequence_length={options.sequence_length}")
    try:
        settings = settings_of_saved_model(
            options.checkpoint, [*batches, *options.overrides], environment
        )
        where = device.prepare_device(settings, environment)
        texts = read_texts(options, settings)
    except (ConfigurationError, ValueError) as error:
        return tell(error, environment.rank)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.checkpoint.state import load_model
    from megatron_kanana.checkpoint.verification import CheckpointError, ensure_whole
    from megatron_kanana.device.safe_unpickling import UnsafeFileError
    from megatron_kanana.training.perplexity import held_out_loss
    from megatron_kanana.training.run import build_bare_model

    model = build_bare_model(settings, where)
    try:
        ensure_whole(options.checkpoint, contents=settings.checkpoint.verify)
        load_model(model.chunks, options.checkpoint)
    except (CheckpointError, UnsafeFileError) as error:
        return tell(error, environment.rank)
    losses: dict[str, HeldOutLoss] = {}
    quiet = environment.rank != 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        for name, text in texts.items():
            task = progress.add_task(name, total=1.0)
            losses[name] = held_out_loss(model, text, _shown(progress, task))
    if environment.rank == 0:
        show(losses, as_json=options.json)
    device.destroy_process_groups()
    return 0


def _shown(progress: Progress, task: TaskID) -> Callable[[float], None]:
    return lambda share: progress.update(task, completed=share)


def read_texts(options: argparse.Namespace, settings: Settings) -> dict[str, HeldOutText]:
    """Each file's windows, by the name it was given.

    Raises:
        ValueError: a file cannot be read, or holds too little to predict.
    """
    assert settings.data.tokenizer is not None
    tokenizer = load_tokenizer(settings.data.tokenizer)
    return {
        str(path): read_held_out(path, tokenizer, settings.data.sequence_length, options.text_key)
        for path in options.data
    }


def show(losses: dict[str, HeldOutLoss], *, as_json: bool) -> None:
    """Print each file's figures, and those of all together."""
    total = functools.reduce(operator.add, losses.values())
    if as_json:
        files = {name: figures(loss) for name, loss in losses.items()}
        print(json.dumps({"files": files, "all": figures(total)}, indent=2, ensure_ascii=False))
        return
    for name, loss in {**losses, "all": total}.items():
        print(
            f"{name}: {loss.documents:,} documents, {loss.tokens:,} tokens,"
            f" loss {loss.loss:.4f} nats a token, perplexity {loss.perplexity:.3f},"
            f" {loss.bits_per_byte:.4f} bits a byte"
        )


def figures(loss: HeldOutLoss) -> dict[str, Any]:
    """What was measured, and what follows from it."""
    return {
        **dataclasses.asdict(loss),
        "loss": loss.loss,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
    }


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a step_… folder")
    parser.add_argument("overrides", nargs="*", help="setting=value, for another layout or device")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl, .txt or .parquet files, or indexed datasets without their suffix",
    )
    parser.add_argument("--text-key", default="text", help="JSON field or parquet column")
    parser.add_argument(
        "--sequence-length", type=int, help="tokens of a window; that of the checkpoint if unset"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="windows in one forward pass of a process"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args()
    # Settings behind --data are no files.
    options.overrides += [str(word) for word in options.data if _is_setting(word)]
    options.data = [path for path in options.data if not _is_setting(path)]
    if not options.data:
        parser.error("--data names no file")
    return options


def _is_setting(word: Path) -> bool:
    return "=" in str(word) and not word.exists()


if __name__ == "__main__":
    sys.exit(main())

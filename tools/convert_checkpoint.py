"""Convert between Hugging Face's deepseek_v3 checkpoints and this project's, without loss.

    python tools/convert_checkpoint.py to-megatron --hf DIR --out CHECKPOINT
    python tools/convert_checkpoint.py to-hf --megatron CHECKPOINT --out DIR
    python tools/convert_checkpoint.py inspect DIR
    python tools/convert_checkpoint.py verify --hf DIR --megatron CHECKPOINT

Weights are streamed: memory stays at a few times the largest tensor. An interrupted conversion
goes on when it is started again, and its folder gets its name only when it is whole. One
checkpoint serves every parallel layout; the sizes given to to-megatron are checked and kept as
its defaults.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_kanana.checkpoint.hugging_face.describe import describe
from megatron_kanana.checkpoint.hugging_face.problems import ConversionError
from megatron_kanana.checkpoint.hugging_face.to_hugging_face import open_megatron, to_hugging_face
from megatron_kanana.checkpoint.hugging_face.to_megatron import open_hugging_face, to_megatron
from megatron_kanana.checkpoint.hugging_face.verify import differences
from megatron_kanana.terminal import byte_progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "virtual_pipeline_stages",
    "expert_parallel_size",
    "expert_tensor_parallel_size",
)
EXIT_DIFFERENT = 1
EXIT_BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return int(options.run(options))
    except ConversionError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or options.out}: {error.strerror}", file=sys.stderr)
    return EXIT_BAD_INPUT


def run_to_megatron(options: argparse.Namespace) -> int:
    """to-megatron."""
    parallel = {name: getattr(options, name) for name in SIZES}
    model = open_hugging_face(options.hf, options.mtp, parallel)
    if model.dropped:
        print(f"left out: {len(model.dropped)} tensors, such as {model.dropped[0]}")
    if model.source.is_quantized:
        print("fp8 weights are dequantised to bf16")
    with byte_progress("converting", model.num_bytes) as on_bytes:
        to_megatron(model, options.out, force=options.force, on_bytes=on_bytes)
    print(f"{options.out}: {len(model.placements):,} tensors, {model.num_bytes / 1e9:.2f} GB")
    return 0


def run_to_hf(options: argparse.Namespace) -> int:
    """to-hf."""
    model = open_megatron(options.megatron, verify=options.verify)
    dtype = DTYPES.get(options.dtype)
    total = sum(
        (dtype or model.dtype(place)).itemsize * torch.Size(place.shape).numel()
        for place in model.placements
    )
    with byte_progress("converting", total) as on_bytes:
        to_hugging_face(
            model,
            options.out,
            dtype=dtype,
            max_shard_bytes=int(options.max_shard_gb * 1e9),
            force=options.force,
            on_bytes=on_bytes,
        )
    print(f"{options.out}: {len(model.placements):,} tensors, {total / 1e9:.2f} GB")
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """inspect."""
    print("\n".join(describe(options.folder)))
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """verify."""
    megatron = open_megatron(options.megatron, verify=options.verify)
    mtp = "keep" if megatron.settings.num_mtp_layers else "drop"
    hugging_face = open_hugging_face(options.hf, mtp)
    with byte_progress("comparing", hugging_face.num_bytes) as on_bytes:
        found = differences(hugging_face, megatron, on_bytes)
    if found:
        print(ConversionError(found), file=sys.stderr)
        return EXIT_DIFFERENT
    print(f"the same, bit by bit: {len(megatron.placements):,} tensors")
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command and its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    hf: dict[str, Any] = {
        "type": Path,
        "required": True,
        "help": "folder with config.json and safetensors",
    }
    megatron: dict[str, Any] = {
        "type": Path,
        "required": True,
        "help": "a checkpoint: a step_… folder",
    }
    force: dict[str, Any] = {
        "action": "store_true",
        "help": "replace OUT, once the new one is whole",
    }

    verify: dict[str, Any] = {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "compare the checkpoint's files with their checksums first",
    }

    command = commands.add_parser("to-megatron", help="Hugging Face folder -> checkpoint")
    command.set_defaults(run=run_to_megatron)
    command.add_argument("--hf", **hf)
    command.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    command.add_argument("--force", **force)
    command.add_argument(
        "--mtp", choices=("keep", "drop"), help="its multi-token prediction layers, if it has any"
    )
    for name in SIZES:
        command.add_argument(f"--{name.replace('_', '-')}", type=int, default=1, metavar="N")

    command = commands.add_parser("to-hf", help="checkpoint -> Hugging Face folder")
    command.set_defaults(run=run_to_hf)
    command.add_argument("--megatron", **megatron)
    command.add_argument("--verify", **verify)
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--force", **force)
    command.add_argument(
        "--dtype", choices=DTYPES, help="format of the weights (default: each as it is stored)"
    )
    command.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="size of the safetensors files (default: 5)"
    )

    command = commands.add_parser("inspect", help="what a folder holds")
    command.set_defaults(run=run_inspect, out=None)
    command.add_argument("folder", type=Path)

    command = commands.add_parser("verify", help="compare both, bit by bit")
    command.set_defaults(run=run_verify, out=None)
    command.add_argument("--hf", **hf)
    command.add_argument("--megatron", **megatron)
    command.add_argument("--verify", **verify)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

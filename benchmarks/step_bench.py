"""Contenders for a training step that share weights and data, and what is measured of them."""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_kanana.config import Settings
from megatron_kanana.planning.architecture import Architecture
from megatron_kanana.planning.flops import flops_per_token

from .card import reason
from .optimizer_step import random_microbatches
from .several_runs import OneProcess, settings_of
from .step_models import Contender, SharedParameters, megatron_contender, our_model
from .step_profile import StepProfile, profile_steps

OURS = "ours"
MEGATRON = "megatron-core + TE" if torch.cuda.is_available() else "megatron-core"
BUILTIN_VOCABULARY = 4096
WARM_UP = 3
DIFFERENT_BATCHES = 4
PROFILED_STEPS = 3
PEER_RECIPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "fp8_blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "fp8_tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}
"""megatron-core's configuration for each precision that it may be measured in."""


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Arguments for the model's slice and the step's size."""
    parser.add_argument("--model", default="kanana_2_30b_a3b", help="of which a slice is taken")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--sequences", type=int, default=2, help="of a microbatch")
    parser.add_argument(
        "--microbatches", type=int, default=1, help="of a step: fp8 weights are made once in it"
    )
    parser.add_argument("--sequence-length", type=int, default=4096)
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Arguments for settings beside those of the slice."""
    parser.add_argument("--set", nargs="*", default=[], help="more settings, as NAME=VALUE")
    parser.add_argument("--ours", nargs="*", default=[], help="more settings of ours alone")


class Bench:
    """Contenders on this process.

    Attributes:
        notes: what could not be run, and why.
        contenders: those that run, by name.
        shared: the weights and gradients of all of them.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.notes: list[str] = []
        self._options = options
        self.contenders: dict[str, Contender] = {}
        self.shared: SharedParameters | None = None
        self._process: OneProcess | None = None
        self._microbatches: Iterator[dict[str, torch.Tensor]] = iter(())

    def build(self) -> None:
        """Build every contender; one that fails leaves the reason."""
        options = self._options
        for precision in options.precisions:
            recipe, *more = precision.split()
            words = [f"precision={recipe}", *options.set, *options.ours, *more]
            settings = partial(settings_of_slice, options, words)
            self._add(f"{OURS}, {precision}", settings, our_model)
        for precision in options.peer_precisions:
            compute = "fp32" if precision == "fp32" else "bf16"
            settings = partial(settings_of_slice, options, [f"precision={compute}", *options.set])
            peer = partial(megatron_contender, **PEER_RECIPES[precision])
            self._add(f"{MEGATRON}, {precision}", settings, peer)

    def _add(
        self, name: str, settings_of_it: Callable[[], Settings], build: Callable[..., Contender]
    ) -> None:
        try:
            settings = settings_of_it()
            if self._process is None:
                self._process = OneProcess(settings)
            contender = build(settings, self._process.device)
            if self.shared is None:
                self.shared = SharedParameters(contender.chunks[0])
            else:
                self.shared.lend_to(contender.chunks[0])
        except Exception as error:  # whatever a peer raises, the others run
            self._leave_out(name, error)
            return
        contender.chunks[0].train()
        self.contenders[name] = contender
        release_memory()

    def _leave_out(self, name: str, error: Exception, size: str = "") -> None:
        self.contenders.pop(name, None)
        self.notes.append(f"not run: {name}{size}: {reason(error)}")
        print(self.notes[-1], flush=True)
        release_memory()

    def set_size(self, sequences: int, length: int) -> None:
        """Take steps of this size from here on, and warm up; what fails is left out."""
        for contender in self.contenders.values():
            contender.settings.schedule.micro_batch_size = sequences
            contender.settings.data.sequence_length = length
        if not self.contenders:
            return
        any_settings = next(iter(self.contenders.values())).settings
        drawn = itertools.islice(random_microbatches(any_settings), DIFFERENT_BATCHES)
        device = self._device()
        batches = [{name: tensor.to(device) for name, tensor in each.items()} for each in drawn]
        self._microbatches = itertools.cycle(batches)
        for name in list(self.contenders):
            try:
                for _ in range(WARM_UP):
                    self._step(name)
                synchronize()
            except Exception as error:  # such as a size that does not fit beside the others
                self._leave_out(name, error, f", {sequences} x {length}")

    def losses(self) -> dict[str, float]:
        """Each contender's loss of the same microbatch."""
        batch = next(self._microbatches)
        found = {}
        for name, contender in self.contenders.items():
            (loss,) = contender.forward_backward(iter([batch]))
            found[name] = float(loss)
        return found

    def gradient_differences(self) -> dict[str, tuple[str, float]]:
        """The parameter whose gradient of one microbatch differs most from the first contender's.

        Returns:
            By contender: our name of it, and the norm of the difference over the gradient's norm.
        """
        batch = next(self._microbatches)
        first: dict[str, torch.Tensor] = {}
        found = {}
        for name, contender in self.contenders.items():
            assert self.shared is not None
            self.shared.zero_gradients()
            contender.forward_backward(iter([batch]))
            gradients = {each: g.cpu() for each, g in self.shared.gradients().items()}
            first = first or gradients
            differences = {
                each: float((gradient - first[each]).norm() / first[each].norm())
                for each, gradient in gradients.items()
            }
            worst = max(differences, key=lambda each: differences[each])
            found[name] = (worst, differences[worst])
        return found

    def times(self, rounds: int, repeats: int) -> dict[str, list[float]]:
        """Seconds of a step, each contender's in each round.

        Each round begins with another, and every other round goes backwards: a GPU at its power
        limit is faster after a contender that let it rest.
        """
        names = list(self.contenders)
        found: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            first = turn % max(1, len(names))
            order = names[first:] + names[:first]
            for name in order if turn % 2 == 0 else reversed(order):
                synchronize()
                start = time.perf_counter()
                for _ in range(repeats):
                    self._step(name)
                synchronize()
                found[name].append((time.perf_counter() - start) / repeats)
        return found

    def host_times(self, steps: int = 5) -> dict[str, list[float]]:
        """Seconds until the host has handed a step to an idle GPU."""
        found: dict[str, list[float]] = {name: [] for name in self.contenders}
        for name, seconds in found.items():
            for _ in range(steps):
                synchronize()
                start = time.perf_counter()
                self._step(name)
                seconds.append(time.perf_counter() - start)
        synchronize()
        return found

    def activation_memory(self) -> dict[str, int]:
        """Peak bytes of a step above what is allocated before; nothing on a CPU."""
        found = {}
        for name in self.contenders if self._device().type == "cuda" else ():
            release_memory()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._step(name)
            synchronize()
            found[name] = torch.cuda.max_memory_allocated() - before
        return found

    def profiles(self, label: str, folder: Path | None, table: bool) -> dict[str, StepProfile]:
        """Where each contender's step goes; nothing on a CPU."""
        found = {}
        for name in self.contenders if self._device().type == "cuda" else ():
            file = f"{label}_{name}.json".replace(" ", "_").replace(",", "")
            trace = None if folder is None else folder / file
            print(f"{label}, {name}", flush=True)
            found[name] = profile_steps(partial(self._step, name), PROFILED_STEPS, trace, table)
        return found

    def tokens(self) -> int:
        """Tokens of a step."""
        settings = next(iter(self.contenders.values())).settings
        sequences = settings.schedule.micro_batch_size * self._options.microbatches
        tokens: int = sequences * settings.data.sequence_length
        return tokens

    def flops(self) -> float:
        """Floating point operations of a step."""
        settings = next(iter(self.contenders.values())).settings
        length = settings.data.sequence_length
        architecture = Architecture.of(settings.model)
        return flops_per_token(architecture, length, with_mtp=False) * self.tokens()

    def _step(self, name: str) -> None:
        self.contenders[name].forward_backward(self._microbatches, self._options.microbatches)

    def _device(self) -> torch.device:
        return self._process.device.torch_device if self._process else torch.device("cpu")


def settings_of_slice(options: argparse.Namespace, more: list[str]) -> Settings:
    """Settings of the first layers of a model, with the whole vocabulary."""
    settings = settings_of(
        [
            *(f"model={options.model}", f"model.num_layers={options.layers}"),
            f"model.vocab_size={BUILTIN_VOCABULARY}",
            f"data.sequence_length={options.sequence_length}",
            f"schedule.micro_batch_size={options.sequences}",
            f"schedule.global_batch_size={options.sequences}",
            *more,
        ]
    )
    settings.model.vocab_size = options.vocabulary  # the tokens are random
    return settings


def release_memory() -> None:
    """Give back what nobody holds, so that contenders find the same memory free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

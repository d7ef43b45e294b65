"""Experts on several processes: results, gradients and checkpoint are those of whole ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import free_ports, run_python, train_in_turn

EXPERT_2 = "parallel.expert_parallel_size=2"
EXPERT_4 = "parallel.expert_parallel_size=4"
TENSOR = "parallel.tensor_parallel_size=2"
EXPERT_TENSOR = "parallel.expert_tensor_parallel_size=2"
LAYOUTS = {
    "EP4": [EXPERT_4],
    "TP2 x EP2": [TENSOR, EXPERT_2],
    "expert-TP2": [EXPERT_TENSOR],
    "EP2 x expert-TP2": [EXPERT_2, EXPERT_TENSOR],
    "nothing split": [],
}
IN_TORCH = ("EP2 x expert-TP2", "nothing split")  # the backend has no part in what is sent
BACKENDS = ("csrc", "torch")
CASES = ("random", "few experts", "one expert")


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Any]:
    """Of each layout and backend, by four processes, one of which has no tokens."""
    names = [(layout, "csrc") for layout in LAYOUTS] + [(layout, "torch") for layout in IN_TORCH]
    jobs = [
        [port, backend, LAYOUTS[layout]]
        for port, (layout, backend) in zip(free_ports(len(names)), names, strict=True)
    ]
    finished = run_python("-m", "tests.parallel.expert_layouts", json.dumps(jobs), processes=4)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return dict(zip(names, json.loads(finished.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(
    ("layout", "backend"),
    [(layout, "csrc") for layout in LAYOUTS] + [(layout, "torch") for layout in IN_TORCH],
)
def test_outputs_and_gradients_are_those_of_a_plain_layer(
    layout: str, backend: str, found: dict[tuple[str, str], Any]
) -> None:
    for case in CASES:
        errors = found[layout, backend][case]["errors"]
        assert len(errors) == 5
        assert max(errors) < 2e-6, (case, errors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_is_sent_once_to_each_process_that_has_some_of_its_experts(
    layout: str, found: dict[tuple[str, str], Any]
) -> None:
    for case in CASES:
        of_case = found[layout, "csrc"][case]
        assert of_case["rows"] == of_case["expected rows"]
        is_split = "EP" in layout
        assert (of_case["rows"] > 0) == is_split


def test_the_loss_curve_is_that_of_any_backend(tmp_path: Path, cache_dir: Path) -> None:
    jobs = {name: [f"kernels.moe_backend={name}", "stop_after_step=12"] for name in BACKENDS}
    curves = train_in_turn(tmp_path, cache_dir, jobs)
    csrc, plain = ([record["loss"] for record in curves[name]] for name in BACKENDS)
    assert len(csrc) == 12
    assert csrc == pytest.approx(plain, rel=1e-5)
    assert csrc[-1] < 0.95 * csrc[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_have_the_parts_of_megatron_cores_sequential_experts(
    layout: str, found: dict[tuple[str, str], Any]
) -> None:
    """So those of earlier versions load, and earlier versions load these."""
    assert found[layout, "csrc"]["stored alike"]

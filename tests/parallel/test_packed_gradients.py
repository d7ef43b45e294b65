"""Documents packed into one sample teach what each alone would, in every layout, in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import free_ports, run_python

TOLERANCE = 1e-5  # relative

TENSOR = "parallel.tensor_parallel_size=2"
CONTEXT = "parallel.context_parallel_size=2"
PIPELINE = "parallel.pipeline_parallel_size=2"
VIRTUAL = "parallel.virtual_pipeline_stages=2"
EXPERT = "parallel.expert_parallel_size=2"
RECOMPUTE = "parallel.recompute=full"
PLAIN = "kernels.backend=torch"

ONE_PROCESS = "one process"
LAYOUTS = {
    ONE_PROCESS: (1, []),
    "full recomputation": (1, [RECOMPUTE]),
    "plain attention": (1, [PLAIN]),
    "TP2": (2, [TENSOR]),
    "CP2": (2, [CONTEXT]),
    "PP2": (2, [PIPELINE]),
    "PP2 with 2 virtual stages": (2, [PIPELINE, VIRTUAL]),
    "EP2 x DP2": (2, [EXPERT]),
    "TP2 x PP2": (4, [TENSOR, PIPELINE]),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, dict[str, Any]]:
    """What every layout found."""
    folder = tmp_path_factory.mktemp("packed")
    results: dict[str, dict[str, Any]] = {}
    for count in sorted({count for count, _ in LAYOUTS.values()}):
        names = [name for name, (processes, _) in LAYOUTS.items() if processes == count]
        jobs = [
            [
                port,
                str(folder / f"{name}.json"),
                [f"data.cache_dir={cache_dir}", f"output_dir={folder}", *LAYOUTS[name][1]],
            ]
            for port, name in zip(free_ports(len(names)), names, strict=True)
        ]
        finished = run_python(
            "tests/parallel/packed_gradients.py", json.dumps(jobs), processes=count
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        results |= {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_is_that_of_each_document_alone(
    layout: str, found: dict[str, dict[str, Any]]
) -> None:
    assert found[layout]["difference"] < TOLERANCE


def test_neither_padding_nor_other_documents_leave_a_trace(
    found: dict[str, dict[str, Any]],
) -> None:
    assert found[ONE_PROCESS]["difference from exact lengths"] < TOLERANCE
    assert found[ONE_PROCESS]["loads are those of exact lengths"]


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_layouts_agree_on_packed_samples_with_padding(
    layout: str, found: dict[str, dict[str, Any]]
) -> None:
    ours, theirs = (found[name]["with balance losses"] for name in (layout, ONE_PROCESS))
    for name in ("loss", "grad_norm", "max logits"):
        assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), name
    assert ours["loads"] == theirs["loads"]


def test_padding_counts_in_no_experts_load(found: dict[str, dict[str, Any]]) -> None:
    tokens = sum((5, 30, 17, 40, 9, 15))
    dense, *experts, multi_token = found[ONE_PROCESS]["with balance losses"]["loads"]
    assert sum(dense) == 0
    assert [sum(load) for load in experts] == [2 * tokens] * len(experts)
    assert sum(multi_token) == 2 * 2 * 64  # megatron-core gives its layers no mask of padding

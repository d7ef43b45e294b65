"""Linear layers on Transformer Engine: built as megatron-core's are, and the same run and files.

megatron-core's own classes run here, on a stand-in for what they inherit from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_kanana.model.linear_layers import mark_whole_layers
from tests.checkpoints import saved_tensors
from tests.launch import train_in_turn

SHORT = ("schedule.steps=4", "schedule.warmup_steps=1", "schedule.decay_steps=1")
EVALUATED = ("schedule.evaluation_interval=2", "schedule.evaluation_batches=1")
THREE = (*SHORT, *EVALUATED, "stop_after_step=3", "model.num_mtp_layers=1")
HALF = (*SHORT, "stop_after_step=1", "model.num_mtp_layers=1")
FP8 = (
    *("precision.fp8=blockwise", "precision.bf16_layers_at_start=1"),
    "precision.output_layer=fp8",  # which a CPU leaves out
)
FP8_AND_RECOMPUTE = (
    *("precision.fp8=tensorwise", "parallel.recompute=full"),
    "precision.bf16_weights=[key_value_down,down]",
)
RUNS_ON_STAND_IN = {
    "te": THREE,
    "fp8": (*THREE, *FP8),
    "fp8_recompute": (*THREE, *FP8_AND_RECOMPUTE),
    "from_torch": THREE,
    "from_te": HALF,
}
DOWN = ["TERowParallelLinear", 128]
"""Of the dense feed-forward."""
PROJECTION = ["TEColumnParallelLinear", 128]
"""That of multi-token prediction."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Any]:
    """Folder, records of the runs, and what the stand-in remembers of each of its runs."""
    folder = tmp_path_factory.mktemp("linear")
    first = train_in_turn(folder, cache_dir, {"torch": THREE, "from_torch": HALF})
    script = ("tests/train_on_stand_in.py", str(folder / "record.json"))
    on_stand_in = train_in_turn(folder, cache_dir, RUNS_ON_STAND_IN, script=script)
    last = train_in_turn(folder, cache_dir, {"from_te": THREE})
    remembered = json.loads((folder / "record.json").read_text())
    return {
        "folder": folder,
        "records": {**first, **on_stand_in, **last},
        "remembered": dict(zip(RUNS_ON_STAND_IN, remembered, strict=True)),
    }


def numbers(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Losses and gradient norms, step by step."""
    names = ("loss", "mtp_losses", "grad_norm", "evaluation_loss")
    return [tuple(record.get(name) for name in names) for record in records]


@pytest.mark.parametrize("name", ["te", "fp8", "fp8_recompute", "from_torch", "from_te"])
def test_losses_and_gradients_are_those_of_layers_in_torch(name: str, runs: dict[str, Any]) -> None:
    """Also through evaluation, and through checkpoints that the other layers wrote."""
    ours, theirs = numbers(runs["records"][name]), numbers(runs["records"]["torch"])
    assert any(row[0] is not None for row in theirs)
    if name.startswith("from_"):  # these began without evaluation
        ours = [row for row in ours if row[0] is not None]
        theirs = [row for row in theirs if row[0] is not None]
    assert ours == theirs


def test_checkpoints_hold_the_same_tensors_and_no_extra_states(runs: dict[str, Any]) -> None:
    folder = runs["folder"]
    checkpoints = {
        name: folder / name / "checkpoints" / "step_00000003"
        for name in ("torch", "te", "fp8", "fp8_recompute", "from_torch", "from_te")
    }
    reference = saved_tensors(checkpoints["torch"])
    for checkpoint in checkpoints.values():
        stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        assert not any("_extra_state" in name for name in stored)
        tensors = saved_tensors(checkpoint)
        assert tensors.keys() == reference.keys()
        assert all(torch.equal(tensors[name], reference[name]) for name in reference)


def test_layers_are_built_for_what_they_are(runs: dict[str, Any]) -> None:
    built = [each for each in runs["remembered"]["te"]["built"] if each["out"] > 0]
    kinds = Counter((each["class"], each["in"], each["out"]) for each in built)
    layers = 5  # with that of multi-token prediction
    assert kinds["TELinear", 64, 32] == layers  # query down
    assert kinds["TELinear", 64, 32 + 8] == layers  # latent and rotary key
    assert kinds["TEColumnParallelLinear", 32, 4 * (16 + 8)] == layers  # query up
    assert kinds["TEColumnParallelLinear", 32, 4 * (16 + 24)] == layers  # keys and values
    assert kinds["TERowParallelLinear", 4 * 24, 64] == layers  # attention's output
    assert kinds["TEColumnParallelLinear", 64, 2 * 128] == 1  # gate and up, of the dense layer
    assert kinds["TERowParallelLinear", 128, 64] == 1
    assert kinds["TEColumnParallelLinear", 2 * 64, 64] == 1  # of multi-token prediction
    modes = {"TELinear": None, "TEColumnParallelLinear": "column", "TERowParallelLinear": "row"}
    for each in built:
        assert each["parallel_mode"] == modes[each["class"]]
        assert not each["bias"]


def layers_computed(contexts: list[list[Any]]) -> Iterator[tuple[bool, set[str | None]]]:
    """Whether a layer is dense, and the recipes its products had, in order.

    A layer begins with the projection of the queries to their latent.
    """
    layer: list[list[Any]] = []
    for each in [*contexts, ["TELinear", 64, None]]:
        begins = each[0] == "TELinear" and (not layer or layer[-1][0] != "TELinear")
        if begins and layer:
            yield any(row[1] == 128 for row in layer), {row[2] for row in layer}
            layer = []
        layer.append(each)


def test_fp8_is_on_in_the_layers_that_are_to_have_it(runs: dict[str, Any]) -> None:
    contexts = runs["remembered"]["fp8"]["contexts"]
    of_layers = [each for each in contexts if each[:2] != PROJECTION]
    for is_dense, recipes in layers_computed(of_layers):
        # The dense layer is the first, which stays in bf16.
        assert recipes == ({None} if is_dense else {"Float8BlockScaling"})
    projections = [each for each in contexts if each[:2] == PROJECTION]
    assert {each[2] for each in projections} == {"Float8BlockScaling"}
    assert {each[2] for each in runs["remembered"]["te"]["contexts"]} == {None}


def test_fp8_leaves_out_the_weights_that_are_to_stay_in_bf16(runs: dict[str, Any]) -> None:
    """Also where activations are computed again."""
    remembered = runs["remembered"]["fp8_recompute"]
    outputs = {(each["class"], each["in"]): set[int]() for each in remembered["built"]}
    for each in remembered["built"]:
        outputs[each["class"], each["in"]].add(each["out"])
    shared = ["TELinear", 64]  # down-projections of queries, and of keys and values
    assert outputs["TELinear", 64] == {32, 40}
    for *layer, recipe in remembered["contexts"]:
        if layer != shared:
            assert recipe == (None if layer == DOWN else "Float8CurrentScaling")
    recipes = [each[2] for each in remembered["contexts"] if each[:2] == shared]
    assert recipes[0::2] == ["Float8CurrentScaling"] * (len(recipes) // 2)
    assert recipes[1::2] == [None] * (len(recipes) // 2)


def test_recompute_under_fp8_is_transformer_engines(runs: dict[str, Any]) -> None:
    remembered = runs["remembered"]
    steps, microbatches, layers = 3, 8, 5
    assert len(remembered["fp8_recompute"]["checkpointed"]) == steps * microbatches * layers
    assert not remembered["fp8"]["checkpointed"]


def test_whole_layers_count_once_in_the_gradient_norm() -> None:
    """Transformer Engine marks them as split like the others."""

    class Layer(torch.nn.Module):
        def __init__(self, parallel_mode: str | None) -> None:
            super().__init__()
            self.fuse_wgrad_accumulation, self.parallel_mode = True, parallel_mode
            self.weight = torch.nn.Parameter(torch.zeros(2, 2))
            self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]

    whole: Any = Layer(None)
    split: Any = Layer("column")
    mark_whole_layers(torch.nn.ModuleList([whole, split]))
    assert not whole.weight.tensor_model_parallel
    assert split.weight.tensor_model_parallel

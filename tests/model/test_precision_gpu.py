"""Transformer Engine's layers, fp8 and the rotary kernel on a GPU, beside torch's in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gradient_cosines import layer_cosines
from megatron_kanana.config.precision_settings import FP8_RECIPES
from tests.checkpoints import saved_tensors
from tests.launch import CONFIG_DIR, run_python, train_in_turn

pytestmark = pytest.mark.gpu

SIZES = (  # multiples of 32, and powers of two where the rotary kernel takes nothing else
    *("model.qk_nope_head_dim=32", "model.qk_rope_head_dim=16", "model.v_head_dim=32"),
    *("model.hidden_size=256", "model.kv_lora_rank=112", "model.q_lora_rank=128"),
    *("model.ffn_hidden_size=512", "model.moe_ffn_hidden_size=128", "model.num_mtp_layers=1"),
)
ON_GPU = ("device=cuda", "kernels.deterministic=true", *SIZES)
TORCH = ("precision=bf16", "kernels.linear_backend=torch", "kernels.rope_backend=torch")
TE = ("precision=bf16", "kernels.linear_backend=te", "kernels.rope_backend=torch")
TRITON = (
    *("precision=bf16", "kernels.linear_backend=torch", "kernels.rope_backend=triton"),
    "kernels.deterministic=false",  # the kernel sums over heads in an order chosen by timing
)


def fp8_of_this_gpu() -> list[str]:
    """Recipes that a test can use here."""
    if not torch.cuda.is_available():
        return ["blockwise", "tensorwise"]
    found = torch.cuda.get_device_capability()
    return [
        name
        for name, recipe in FP8_RECIPES.items()
        if found >= recipe.capability and (recipe.below is None or found < recipe.below)
    ]


SMALLEST_COSINE = 0.99
SMALLEST_COSINE_WITH_EXPERTS = 0.98
"""Of a layer's gradient. Experts that are 128 wide average few roundings: it is 0.9877 here, and
0.992 in the model of 0.25 billion parameters of `benchmarks.loss_parity`."""
EXPERTS_IN_FP8 = {
    "experts": ("precision=fp8_blockwise_experts",),
    "experts, activations kept in fp8": (
        "precision=fp8_blockwise_experts",
        "precision.kept_activations=fp8",
    ),
    "experts and output layer": ("precision=fp8_blockwise_output_layer",),
}


def experts_of_this_gpu() -> list[str]:
    """Of them, what a test can use here."""
    is_other = torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)
    return [] if is_other else list(EXPERTS_IN_FP8)


def in_fp8(recipe: str) -> tuple[str, ...]:
    """Words that choose it."""
    if recipe in EXPERTS_IN_FP8:
        return EXPERTS_IN_FP8[recipe]
    return (f"precision={'' if recipe == 'mxfp8' else 'fp8_'}{recipe}",)


def first_gradients(folder: Path, cache_dir: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """The first step's gradients by parameter, and its loss."""
    output = folder / "gradients.pt"
    finished = run_python(
        *("tests/model/first_gradients.py", str(output), "--config-dir", str(CONFIG_DIR)),
        *("experiment=small", f"data.cache_dir={cache_dir}", f"output_dir={folder}"),
        *(*ON_GPU, *words),
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = torch.load(output)
    return found


def cosines(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Between gradients of each layer."""
    names = theirs.keys() - {"loss"}
    return layer_cosines(ours, {name: theirs[name] for name in names})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Any]:
    """Loss and gradients in bf16, in torch."""
    return first_gradients(tmp_path_factory.mktemp("reference"), cache_dir, TORCH)


@pytest.mark.parametrize("words", [TE, TRITON], ids=["linear layers", "rotary embeddings"])
def test_gradients_in_bf16_are_those_of_torch(
    words: tuple[str, ...], reference: dict[str, Any], tmp_path: Path, cache_dir: Path
) -> None:
    ours = first_gradients(tmp_path, cache_dir, words)
    assert ours["loss"].item() == pytest.approx(reference["loss"].item(), rel=2e-3)
    assert min(cosines(ours, reference).values()) > 0.998  # bf16 beside fp32: 0.9987


@pytest.mark.parametrize("recipe", [*fp8_of_this_gpu(), *experts_of_this_gpu()])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_in_fp8_point_where_those_in_bf16_do(
    recipe: str, recompute: str, reference: dict[str, Any], tmp_path: Path, cache_dir: Path
) -> None:
    words = (*in_fp8(recipe), f"parallel.recompute={recompute}")
    ours = first_gradients(tmp_path, cache_dir, words)
    assert ours["loss"].item() == pytest.approx(reference["loss"].item(), rel=5e-3)
    found = cosines(ours, reference)
    of_experts = recipe in EXPERTS_IN_FP8
    limit = SMALLEST_COSINE_WITH_EXPERTS if of_experts else SMALLEST_COSINE
    assert min(found.values()) >= limit, found
    assert max(found[layer] for layer in found if "layers" in layer) < 1 - 1e-7  # fp8 it was


@pytest.mark.parametrize("recipe", fp8_of_this_gpu())
def test_a_run_in_fp8_goes_on_bit_by_bit_and_saves_what_one_in_bf16_does(
    recipe: str, tmp_path: Path, cache_dir: Path
) -> None:
    """With Muon and QK-Clip, which change weights whose fp8 copies are kept during a step."""
    words = (
        *(
            *ON_GPU,
            "optimizer=muon",
            "optimizer.qk_clip_threshold=0.05",
            "optimizer.learning_rate=1e-2",
        ),
        *("schedule.evaluation_interval=2", "schedule.evaluation_batches=1", "stop_after_step=6"),
        *("logging.report=true", "logging.sample_tokens=5"),  # generates text between the steps
    )
    fp8 = in_fp8(recipe)
    runs = {
        "straight": (*words, *fp8),
        "halves": (*words, *fp8, "stop_after_step=3"),
        "bf16": (*words, *TORCH),
    }
    records = train_in_turn(tmp_path, cache_dir, runs)
    records |= train_in_turn(tmp_path, cache_dir, {"halves": (*words, *fp8)})
    losses = {
        name: [record["loss"] for record in rows if "loss" in record]
        for name, rows in records.items()
    }
    assert losses["halves"] == losses["straight"]
    assert losses["straight"] == pytest.approx(losses["bf16"], rel=1e-2)
    assert losses["straight"] != losses["bf16"]
    ends = {name: saved_tensors(tmp_path / name / "checkpoints" / "step_00000006") for name in runs}
    for name, tensor in ends["bf16"].items():
        assert torch.equal(ends["halves"][name], ends["straight"][name])
        assert ends["straight"][name].dtype == tensor.dtype
        assert ends["straight"][name].shape == tensor.shape
    assert ends["bf16"].keys() == ends["straight"].keys()

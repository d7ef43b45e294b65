"""On a Hopper GPU a whole run has the same bits each time, also when it was killed and resumed.

python -m pytest -m gpu tests/faults/test_determinism_gpu.py     # a minute

The runs of both precisions go on beside one another. The model has the kernels of this project for
attention, experts and losses, Transformer Engine's linear layers, and MuonClip with a threshold
that heads are above.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.repeated_runs import AGAIN, FIRST, KILLED, SAVE_INTERVAL, STEPS, RepeatedRuns

pytestmark = pytest.mark.gpu

PRECISIONS = ("bf16", "fp8_blockwise")
MODEL = (  # the smallest that the kernels for Hopper take, in fp8 as well
    *("model.hidden_size=256", "model.kv_lora_rank=128", "model.q_lora_rank=128"),
    *("model.qk_nope_head_dim=128", "model.qk_rope_head_dim=64", "model.v_head_dim=128"),
    *("model.ffn_hidden_size=512", "model.moe_ffn_hidden_size=128", "model.num_mtp_layers=1"),
    "data.sequence_length=128",
)
KERNELS = (
    *("device=cuda", "kernels.deterministic=true", "kernels.backend=csrc"),
    *("kernels.moe_backend=csrc", "kernels.linear_backend=te", "kernels.loss_backend=csrc"),
    "kernels.norm_backend=csrc",
)
MUON_CLIP = ("optimizer=muon", "optimizer.qk_clip_threshold=0.02")
OFTEN = (
    *("schedule.evaluation_interval=8", "schedule.evaluation_batches=1"),
    "schedule.weight_average_decay=0.9",
)

Trained = dict[str, "Future[RepeatedRuns]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Trained]:
    """The runs of each precision."""
    folder = tmp_path_factory.mktemp("repeated")

    def train(precision: str) -> RepeatedRuns:
        words = (*MODEL, *KERNELS, *MUON_CLIP, *OFTEN, f"precision={precision}")
        runs = RepeatedRuns(folder / precision, cache_dir, words)
        runs.train()
        return runs

    with ThreadPoolExecutor() as pool:
        yield {precision: pool.submit(train, precision) for precision in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_runs_from_one_seed_have_the_same_bits_in_every_checkpoint(
    precision: str, trained: Trained
) -> None:
    """One of them saves in the background, while the weights on the GPU change."""
    runs = trained[precision].result()
    assert runs.steps(FIRST) == [*range(SAVE_INTERVAL, STEPS, SAVE_INTERVAL), STEPS]
    assert runs.differences(AGAIN) == []
    assert any(record.get("clipped_heads") for record in runs.records(FIRST))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_killed_in_the_middle_ends_with_the_bits_of_the_undisturbed_one(
    precision: str, trained: Trained
) -> None:
    runs = trained[precision].result()
    step, saved = runs.killed_at
    assert 0 < saved <= step < STEPS
    assert "loaded " in runs.log(KILLED)
    assert runs.differences(KILLED) == []

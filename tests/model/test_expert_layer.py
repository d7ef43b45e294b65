"""A layer of experts on one process neither copies its tokens nor waits for the device."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_kanana.config import Environment, load_settings
from megatron_kanana.model.dispatcher import LocalDispatcher
from tests.launch import CONFIG_DIR, run_python


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_runs_without_waiting_for_the_device(device: str) -> None:
    """On a CPU nothing is waited for; there it shows that the layer runs in bf16."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    finished = run_python("-m", "tests.model.expert_layer", device)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    words = ["experiment=small"]
    model = load_settings(words, Environment(), str(CONFIG_DIR), with_files=False).model
    tokens = 64 * 2
    assert found["shape"] == [64, 2, 128]
    assert found["finite"]
    assert found["nonzero"]
    assert found["counted"] == 2 * tokens * model.num_experts_per_token


def test_tokens_reach_local_experts_where_they_lie() -> None:
    dispatcher = LocalDispatcher.__new__(LocalDispatcher)
    dispatcher.num_local_experts, dispatcher.backend = 4, "torch"
    tokens, weights = torch.randn(3, 2, 8), torch.rand(6, 2)
    chosen = torch.rand(6, 4).argsort(1)[:, :2].int()
    hidden, probs = dispatcher.dispatch_preprocess(tokens, chosen, weights)
    hidden, probs = dispatcher.token_dispatch(hidden, probs)
    hidden, permutation, probs = dispatcher.dispatch_postprocess(hidden, probs)
    assert hidden.data_ptr() == tokens.data_ptr()
    assert probs is weights
    assert permutation.offsets_E1.tolist() == [
        0,
        *torch.bincount(chosen.flatten(), minlength=4).cumsum(0).tolist(),
    ]
    back = dispatcher.combine_postprocess(dispatcher.token_combine(hidden))
    assert back.shape == tokens.shape
    assert back.data_ptr() == tokens.data_ptr()

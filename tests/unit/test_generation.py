"""Choosing tokens: closed forms, and when a continuation ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_kanana.training import generation
from megatron_kanana.training.sampling import Sampling, next_token_probabilities

PROBABILITIES = [0.4, 0.05, 0.3, 0.1, 0.15]
LOGITS = torch.tensor([math.log(p) + 3.0 for p in PROBABILITIES])


def probabilities(logits: torch.Tensor = LOGITS, unused: tuple[int, ...] = (), **how: float) -> Any:
    """Of the tokens, as a list."""
    return next_token_probabilities(logits, Sampling(**how), len(logits), unused).tolist()  # type: ignore[arg-type]


def test_temperature_raises_probabilities_to_its_inverse() -> None:
    for temperature in (0.25, 0.7, 1.0, 3.0):
        powers = [p ** (1 / temperature) for p in PROBABILITIES]
        expected = [power / sum(powers) for power in powers]
        assert probabilities(temperature=temperature) == pytest.approx(expected, rel=1e-5)


def test_temperature_zero_takes_the_largest_and_of_equals_the_first() -> None:
    assert probabilities(temperature=0.0) == [1, 0, 0, 0, 0]
    assert probabilities(torch.tensor([1.0, 7.0, 7.0]), temperature=0.0) == [0, 1, 0]
    assert probabilities(torch.tensor([1e4, -1e4]), temperature=1e-3) == [1, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.1, [0]),
        (0.4, [0]),
        (0.41, [0, 2]),
        (0.7, [0, 2]),
        (0.8, [0, 2, 4]),
        (0.94, [0, 2, 4, 3]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: list[int]) -> None:
    total = sum(PROBABILITIES[token] for token in kept)
    expected = [p / total if token in kept else 0 for token, p in enumerate(PROBABILITIES)]
    got = probabilities(temperature=1.0, top_p=top_p - 1e-6 if top_p < 1 else 1.0)
    assert got == pytest.approx(expected, rel=1e-5)


def test_tokens_that_stand_for_nothing_are_never_chosen() -> None:
    got = probabilities(temperature=1.0, unused=(0, 3))
    assert got == pytest.approx([0, 0.1, 0.6, 0, 0.3], rel=1e-5)
    padded = torch.cat([LOGITS, torch.full((3,), 99.0)])
    assert len(next_token_probabilities(padded, Sampling(), 5)) == 5


class ScriptedForward:
    """Stands in for the model: logits from a function of the text's length."""

    logits: Callable[[int], torch.Tensor]

    def __init__(self, _: object, capacity: int) -> None:
        self.capacity, self.length = capacity, 0

    def append(self, tokens: list[int]) -> torch.Tensor:
        """Logits after the tokens."""
        self.length += len(tokens)
        assert self.length <= self.capacity
        return type(self).logits(self.length)


@pytest.fixture
def continuation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., generation.Continuation]:
    """Generate with scripted logits, a vocabulary of 5, stop tokens 1 and 3, a context of 10."""
    tokenizer = SimpleNamespace(vocab_size=5, unused_ids=[], stop_ids=frozenset([1, 3]))
    settings = SimpleNamespace(data=SimpleNamespace(sequence_length=10))
    where = SimpleNamespace(torch_device=torch.device("cpu"))
    model: Any = SimpleNamespace(tokenizer=tokenizer, settings=settings, device=where, chunks=[])
    monkeypatch.setattr(generation, "CachedForward", ScriptedForward)
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)

    def run(
        logits: Callable[[int], torch.Tensor], prompt: list[int], max_tokens: int, **how: float
    ) -> generation.Continuation:
        monkeypatch.setattr(ScriptedForward, "logits", staticmethod(logits), raising=False)
        return generation.generate(model, prompt, max_tokens, Sampling(**how))  # type: ignore[arg-type]

    return run


def one_hot(token: int) -> torch.Tensor:
    """Logits that leave no choice."""
    return torch.eye(5)[token] * 100


def test_it_ends_at_any_stop_token_at_max_tokens_or_where_the_context_is_full(
    continuation: Callable[..., generation.Continuation],
) -> None:
    stopped = continuation(lambda length: one_hot(3 if length == 6 else 2), [0, 0, 0, 0], 5)
    assert (stopped.tokens, stopped.ended_by) == ([2, 2], "stop token")
    stopped = continuation(lambda _: one_hot(1), [0], 5)
    assert (stopped.tokens, stopped.ended_by) == ([], "stop token")
    enough = continuation(lambda _: one_hot(4), [0, 0], 8)
    assert (enough.tokens, enough.ended_by) == ([4] * 8, "max tokens")
    full = continuation(lambda _: one_hot(4), [0, 0], 9)
    assert (full.tokens, full.ended_by) == ([4] * 8, "context full")
    with pytest.raises(ValueError, match="10 tokens, which leaves no room in a context of 10"):
        continuation(lambda _: one_hot(4), [0] * 10, 1)


def test_samples_follow_the_distribution_and_the_seed(
    continuation: Callable[..., generation.Continuation],
) -> None:
    counts = torch.zeros(5)
    firsts = []
    for seed in range(4000):
        tokens = continuation(lambda _: LOGITS, [0], 1, temperature=1.0, seed=seed).tokens
        firsts.append(tokens[0] if tokens else 1)  # of the stop tokens, taken together
        counts[firsts[-1]] += 1
    expected = torch.tensor([0.4, 0.15, 0.3, 0.0, 0.15]) * len(firsts)
    seen = expected > 0
    chi_squared = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
    assert chi_squared < 16.3  # 3 degrees of freedom: exceeded once in a thousand
    again = continuation(lambda _: LOGITS, [0], 9, temperature=1.0, seed=5)
    assert again == continuation(lambda _: LOGITS, [0], 9, temperature=1.0, seed=5)
    others = [continuation(lambda _: LOGITS, [0], 9, temperature=1.0, seed=s) for s in range(9)]
    assert len({tuple(other.tokens) for other in others}) > 5

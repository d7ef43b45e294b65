"""QK-Clip's arithmetic: exactly to the threshold, other heads untouched, no NaN."""

from __future__ import annotations

import pytest
import torch

from megatron_kanana.config.schema import ModelSettings
from megatron_kanana.config.shipped import shipped_model
from megatron_kanana.optimizer.qk_clip import clip_factors, row_factors, scale_rows_

NOPE, ROPE, VALUE, HEADS = 6, 4, 5, 3


@pytest.fixture
def model() -> ModelSettings:
    """Sizes that are all different."""
    model = shipped_model("kanana_2_tiny")
    model.num_attention_heads = HEADS
    model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim = NOPE, ROPE, VALUE
    return model


def max_logits(
    query: torch.Tensor, key_value: torch.Tensor, rope_key: torch.Tensor, seed: int
) -> torch.Tensor:
    """Largest logit of each head on random inputs, by the formulas of DeepSeek-V2, section 2.1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(20, query.shape[1], generator=generator, dtype=torch.float64)
    latent = torch.randn(20, key_value.shape[1], generator=generator, dtype=torch.float64)
    angle = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    queries = (hidden @ query.T).view(20, HEADS, NOPE + ROPE)
    keys = (latent @ key_value.T).view(20, HEADS, NOPE + VALUE)[..., :NOPE]
    shared = hidden @ rope_key.T

    def turn(x: torch.Tensor) -> torch.Tensor:
        cos, sin = angle.cos(), angle.sin()
        if x.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)

    logits = torch.einsum("qhd,khd->hqk", queries[..., :NOPE], keys)
    logits += torch.einsum("qhd,kd->hqk", turn(queries[..., NOPE:]), turn(shared))
    return logits.masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf).amax((1, 2))


def test_a_head_above_the_threshold_is_brought_to_it_and_the_others_stay(
    model: ModelSettings,
) -> None:
    torch.manual_seed(3)
    query = torch.randn(HEADS * (NOPE + ROPE), 8, dtype=torch.float64)
    key_value = torch.randn(HEADS * (NOPE + VALUE), 7, dtype=torch.float64)
    rope_key = torch.randn(ROPE, 8, dtype=torch.float64)
    planted = 300 / max_logits(query, key_value, rope_key, 5)[1]
    query.view(HEADS, -1, 8)[1] *= planted
    before = max_logits(query, key_value, rope_key, 5)
    assert before[1] == pytest.approx(300)
    assert before.sort().values[1] < 100
    gamma = clip_factors(before, 100.0)
    values = key_value.view(HEADS, -1, 7)[:, NOPE:].clone()
    for weight, is_query in ((query, True), (key_value, False)):
        factors = row_factors(gamma, model, is_query=is_query)
        scale_rows_(weight.view(-1), 0, weight.shape[1], factors)
    after = max_logits(query, key_value, rope_key, 5)
    assert after[1] == pytest.approx(100.0, rel=1e-12)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert torch.equal(values, key_value.view(HEADS, -1, 7)[:, NOPE:])


@pytest.mark.parametrize("small", [-3.0, 0.0, -torch.inf, torch.inf, torch.nan, 99.9, 100.0])
def test_other_maxima_leave_a_head_as_it_is(small: float) -> None:
    assert clip_factors(torch.tensor([small, 400.0]), 100.0).tolist() == [1.0, 0.25]
    assert clip_factors(torch.tensor([small, 400.0]), 1e-3)[0].isfinite()


@pytest.mark.parametrize("columns", [1, 5])
def test_any_piece_of_a_flat_matrix_is_scaled_by_its_rows(columns: int) -> None:
    matrix, factors = torch.randn(7, columns), torch.rand(7)
    scaled = (matrix * factors[:, None]).flatten()
    for start in range(7 * columns):
        for end in range(start, 7 * columns + 1):
            piece = matrix.flatten()[start:end].clone()
            scale_rows_(piece, start, columns, factors)
            assert torch.equal(piece, scaled[start:end])

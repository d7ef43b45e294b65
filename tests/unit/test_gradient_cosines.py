"""Cosines of gradients, beside torch's of the whole."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gradient_cosines import cosine, layer_cosines


def test_parameters_of_a_layer_count_together_and_others_by_themselves() -> None:
    names = ("layers.0.q.weight", "layers.0.o.weight", "layers.11.q.weight", "embedding.weight")
    ours = {name: torch.randn(5, 7) for name in names}
    theirs = {name: gradient + 0.3 * torch.randn(5, 7) for name, gradient in ours.items()}
    found = layer_cosines(ours, theirs)
    assert found.keys() == {"layers.0", "layers.11", "embedding.weight"}
    a, b = (
        torch.cat([each[names[0]].flatten(), each[names[1]].flatten()]) for each in (ours, theirs)
    )
    assert found["layers.0"] == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), rel=1e-5)
    assert found["layers.11"] == cosine(ours[names[2]], theirs[names[2]])


def test_a_cosine_is_one_of_a_vector_with_itself_and_minus_one_with_its_opposite() -> None:
    vector = torch.randn(1000)
    assert cosine(vector, 3 * vector) == pytest.approx(1.0)
    assert cosine(vector, -vector) == pytest.approx(-1.0)

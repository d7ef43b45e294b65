"""Muon's rule against closed forms and against a plain float64 version of it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from megatron_kanana.config.schema import ModelSettings, OptimizerSettings
from megatron_kanana.config.shipped import shipped_model
from megatron_kanana.optimizer.assignment import assign, orthogonalization_cost, rounds
from megatron_kanana.optimizer.distributed_muon import DistributedMuon, muon_weights
from megatron_kanana.optimizer.flat_shards import FlatParameter, Piece
from megatron_kanana.optimizer.matrix_groups import MatrixGroup
from megatron_kanana.optimizer.muon import directions, nesterov_momentum, update_scale

RATE, DECAY, MOMENTUM = 0.01, 0.1, 0.95


class OneProcess:
    """As much of a process group as one process needs."""

    def size(self) -> int:
        """Processes."""
        return 1

    def rank(self) -> int:
        """This one."""
        return 0


def muon(
    weights: dict[str, torch.Tensor], model: ModelSettings, **settings: Any
) -> tuple[DistributedMuon, dict[str, torch.Tensor]]:
    """Muon on one process, and the flat fp32 weights it updates."""
    mains = {name: weight.flatten().clone() for name, weight in weights.items()}
    flats = [
        FlatParameter(
            0,
            name,
            torch.nn.Parameter(weight.clone()),
            (Piece(0, 0, weight.numel()),),
            Piece(0, 0, weight.numel()),
            mains[name],
            {"lr": RATE, "weight_decay": DECAY},
        )
        for name, weight in weights.items()
    ]
    group: Any = OneProcess()
    options = OptimizerSettings(learning_rate=RATE, momentum=MOMENTUM, **settings)
    matrix_group = MatrixGroup(group, 1, 0, {(0, 0): 0})
    return DistributedMuon(muon_weights(flats, 1), matrix_group, options, model), mains


def polar(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton-Schulz as Keller Jordan writes it, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: torch.Tensor = matrix.double()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def row_blocks(name: str, model: ModelSettings) -> list[list[int]]:
    """Rows of each logical matrix, written down by hand for the tiny model's sizes."""
    nope, rope, v, heads = 32, 16, 32, 4
    if "kv_up" in name:
        head = range(0, heads * (nope + v), nope + v)
        return [
            [start + i for start in head for i in range(nope)],
            [start + nope + i for start in head for i in range(v)],
        ]
    if "kv_down" in name:
        return [list(range(64)), list(range(64, 64 + rope))]
    if "fc1" in name:
        return [list(range(64)), list(range(64, 128))]
    return [list(range(heads * (nope + rope)))]


@pytest.mark.parametrize("scale", ["match_adamw", "jordan", "spectral"])
def test_steps_are_those_of_a_plain_float64_version(scale: str) -> None:
    model = shipped_model("kanana_2_tiny")
    shapes = {
        "decoder.layers.0.self_attention.linear_q_proj.weight": (192, 128),
        "decoder.layers.0.self_attention.linear_kv_down_proj.weight": (80, 128),
        "decoder.layers.0.self_attention.linear_kv_up_proj.weight": (256, 64),
        "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight": (128, 128),
        "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight": (128, 128),
    }
    torch.manual_seed(1)
    start = {name: torch.randn(shape) for name, shape in shapes.items()}
    optimizer, mains = muon(
        start,
        model,
        orthogonalization="newton_schulz",
        orthogonalization_steps=4,
        update_scale=scale,
    )
    expected = {name: weight.double() for name, weight in start.items()}
    momenta = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    factors = {
        "match_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
        "jordan": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
        "spectral": lambda rows, columns: (rows / columns) ** 0.5,
    }
    for _ in range(3):
        for name, shape in shapes.items():
            gradient = torch.randn(shape)
            mains[name].grad = gradient.flatten()
            momenta[name] = MOMENTUM * momenta[name] + gradient.double()
            ahead = gradient.double() + MOMENTUM * momenta[name]
            expected[name] = expected[name] * (1 - RATE * DECAY)
            for rows in row_blocks(name, model):
                factor = factors[scale](len(rows), shape[1])
                expected[name][rows] -= RATE * factor * polar(ahead[rows], 4)
        optimizer.step()
    for name, shape in shapes.items():
        ours = mains[name].view(shape).double()
        assert (ours - expected[name]).norm() / expected[name].norm() < 1e-6, name
        assert (mains[name] - start[name].flatten()).norm() > 0.1


def test_without_gradients_only_decay_acts_with_the_unscaled_rate() -> None:
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    weight = torch.randn(16, 24)
    optimizer, mains = muon({name: weight}, shipped_model("kanana_2_tiny"))
    for _ in range(3):
        mains[name].grad = torch.zeros(16 * 24)
        optimizer.step()
    torch.testing.assert_close(mains[name], weight.flatten() * (1 - RATE * DECAY) ** 3)


@pytest.mark.parametrize(("rows", "columns"), [(96, 32), (32, 96), (64, 64)])
def test_elements_of_an_update_have_the_root_mean_square_of_adamws(rows: int, columns: int) -> None:
    (update,) = directions([torch.randn(1, rows, columns)], "polar_express", 12, "match_adamw")
    # A [rows, columns] matrix with orthonormal rows or columns has min(rows, columns) squares of 1.
    root_mean_square = 0.2 * math.sqrt(max(rows, columns) * min(rows, columns) / (rows * columns))
    assert float(update.square().mean().sqrt()) == pytest.approx(root_mean_square, rel=1e-3)
    assert root_mean_square == pytest.approx(0.2)


def test_momentum_is_nesterovs() -> None:
    gradients = torch.randn(4, 8, dtype=torch.float64)
    momentum = torch.zeros(8, dtype=torch.float64)
    for step in range(4):
        ahead = nesterov_momentum(gradients[step], momentum, 0.9, torch.float64)
        powers = 0.9 ** torch.arange(step, -1, -1, dtype=torch.float64)
        total = powers @ gradients[: step + 1]
        torch.testing.assert_close(momentum, total)
        torch.testing.assert_close(ahead, gradients[step] + 0.9 * total)


def test_another_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="match_adamw"):
        update_scale("none", 2, 3)


def test_batches_of_equal_shapes_are_computed_as_if_alone() -> None:
    matrices = [torch.randn(1, 6, 9), torch.randn(3, 9, 4), torch.randn(2, 6, 9)]
    together = directions(matrices, "polar_express", 5, "jordan")
    alone = [
        torch.cat(
            [
                directions([matrix[i : i + 1]], "polar_express", 5, "jordan")[0]
                for i in range(len(matrix))
            ]
        )
        for matrix in matrices
    ]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cost_counts_products() -> None:
    # X X^T and polynomial times X: 2 n^2 m each; square of a symmetric [n, n]: 2 n^3.
    assert orthogonalization_cost([(3, 4, 10)]) == 3 * (2 * 2 * 16 * 10 + 2 * 64)
    assert orthogonalization_cost([(3, 10, 4)]) == orthogonalization_cost([(3, 4, 10)])


def test_assignment_is_within_grahams_bound_of_the_best() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        costs = torch.randint(1, 100, (7,), generator=generator).tolist()
        owners = assign(costs, 3)
        longest = max(_load(costs, owners, process) for process in range(3))
        best = min(
            max(_load(costs, list(other), process) for process in range(3))
            for other in itertools.product(range(3), repeat=7)
        )
        assert longest <= (4 / 3 - 1 / 9) * best


def _load(costs: list[int], owners: list[int], process: int) -> int:
    return sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == process)


def test_assignment_of_the_30b_models_attention_is_balanced() -> None:
    model = shipped_model("kanana_2_30b_a3b")
    hidden, heads = model.hidden_size, model.num_attention_heads
    layer = [
        [(1, heads * 192, hidden)],
        [(1, 512, hidden), (1, 64, hidden)],
        [(1, heads * 128, 512), (1, heads * 128, 512)],
        [(1, hidden, heads * 128)],
        [(1, 1536, hidden), (1, 1536, hidden)],
        [(1, hidden, 1536)],
    ]
    costs = [orthogonalization_cost(shapes) for _ in range(model.num_layers) for shapes in layer]
    owners = assign(costs, 8)
    loads = [_load(costs, owners, process) for process in range(8)]
    assert max(loads) / (sum(costs) / 8) < 1.03


def test_rounds_keep_the_order_and_the_limit_of_each_process() -> None:
    owners, sizes = [0, 1, 0, 1, 0, 1], [4, 4, 4, 9, 4, 1]
    result = rounds(owners, sizes, [0, 1, 2, 3, 4, 5], limit=8)
    assert result == [[0, 1, 2], [3, 4], [5]]
    assert sorted(task for tasks in result for task in tasks) == list(range(6))

"""The compiled flash attention on a CPU against attention's definition in float64."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.error_draws import is_larger_beyond_chance
from megatron_kanana.kernels.native import native_library_error

from .attention_reference import (
    Inputs,
    Shape,
    float64_attention,
    float64_gradients,
    random_documents,
    random_inputs,
    visible_keys,
)

assert native_library_error() is None

forward = torch.ops.megatron_kanana.flash_attention_forward
backward = torch.ops.megatron_kanana.flash_attention_backward
instruction_set = torch.ops.megatron_kanana.cpu_instruction_set

NAMES = ("out", "logsumexp", "max_logits", "grad_query", "grad_key", "grad_value")
# fp32 sums of hundreds of terms of order one.
TOLERANCE = 1e-5

# Query-key and value widths: the tiny model's, usual ones, those of MLA, some that fit no vector.
WIDTHS = [(24, 16), (48, 32), (64, 64), (128, 128), (192, 128), (1, 1), (7, 5), (33, 100)]


def empty_maxima(heads: int) -> torch.Tensor:
    return torch.full((heads,), -math.inf)


def run(
    inputs: Inputs,
    scale: float,
    causal: bool = True,
    documents: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """All outputs of both operations, by name."""
    max_logits = empty_maxima(inputs.query.shape[2])
    tensors = inputs.query, inputs.key, inputs.value
    out, logsumexp = forward(*tensors, scale, causal, documents, max_logits)
    grads = backward(inputs.grad_out, *tensors, out, logsumexp, scale, causal, documents, True)
    return dict(zip(NAMES, (out, logsumexp, max_logits, *grads), strict=True))


def exact(
    inputs: Inputs,
    scale: float,
    causal: bool = True,
    documents: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The same in float64."""
    tensors = inputs.query, inputs.key, inputs.value
    outputs = float64_attention(*tensors, scale, causal, documents)
    grads = float64_gradients(inputs, scale, causal, documents)
    return dict(zip(NAMES, (*outputs, *grads), strict=True))


def largest_errors(
    ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Largest difference of each, relative to the reference's largest value if that is above 1.

    Where the reference is -inf, ours must be, and there is no NaN.
    """
    errors = {}
    for name, expected in reference.items():
        assert ours[name].shape == expected.shape
        finite = expected.isfinite()
        assert torch.equal(ours[name][~finite].double(), expected[~finite].double()), name
        assert ours[name][finite].isfinite().all(), name
        size = max(1.0, float(expected[finite].abs().max())) if finite.any() else 1.0
        difference = (ours[name].double() - expected)[finite].abs()
        errors[name] = float(difference.max()) / size if finite.any() else 0.0
    return errors


def check_lengths(width: int, value_width: int, causal: bool, with_documents: bool) -> None:
    """Compare lengths below, at and above multiples of tiles, and random ones."""
    generator = torch.Generator().manual_seed(width)
    lengths = [1, 2, 63, 64, 65, *torch.randint(1, 301, (2,), generator=generator).tolist()]
    for seed, length in enumerate(lengths):
        batch, key_heads, group = 1 + seed % 2, 1 + seed % 3, 1 + seed % 2
        shape = Shape(length, batch, key_heads * group, key_heads, width, value_width)
        inputs = random_inputs(shape, seed=seed)
        documents = random_documents(batch, length, seed=seed) if with_documents else None
        errors = largest_errors(
            run(inputs, inputs.scale, causal, documents),
            exact(inputs, inputs.scale, causal, documents),
        )
        assert max(errors.values()) < TOLERANCE, (shape, errors)


@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all keys"])
@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
def test_output_maxima_and_gradients_are_those_of_float64(
    width: int, value_width: int, causal: bool, with_documents: bool
) -> None:
    check_lengths(width, value_width, causal, with_documents)


def test_a_head_cut_into_chunks_has_the_same_gradients() -> None:
    inputs = random_inputs(Shape(1100, 1, 2, 1, 32, 16), seed=1)
    errors = largest_errors(run(inputs, 0.2), exact(inputs, 0.2))
    assert max(errors.values()) < TOLERANCE, errors


NARROW_PROGRAM = """
import itertools, sys
from tests.kernels.test_flash_attention_cpu import WIDTHS, check_lengths, instruction_set
assert instruction_set() == sys.argv[1], instruction_set()
for widths, causal, documents in itertools.product(WIDTHS, (True, False), (True, False)):
    check_lengths(*widths, causal, documents)
"""


@pytest.mark.parametrize(("capability", "name"), [("avx2", "avx2"), ("default", "baseline")])
def test_processors_with_narrower_vectors_compute_the_same(capability: str, name: str) -> None:
    """In a process in which torch, and so our operation, is told to use less than there is."""
    if capability == "avx2" and instruction_set() == "baseline":
        pytest.skip("this processor has no AVX2")
    subprocess.run(
        [sys.executable, "-c", NARROW_PROGRAM, name],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )


def test_instruction_set_follows_what_torch_uses() -> None:
    expected = {"AVX512": "avx512", "AVX2": "avx2", "DEFAULT": "baseline"}
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in expected:
        assert instruction_set() == expected[capability]


def test_views_of_joint_tensors_give_the_same_bits_as_copies() -> None:
    length, batch, heads, width, value_width = 70, 2, 4, 24, 16
    generator = torch.Generator().manual_seed(2)
    joint = torch.randn(batch, length, heads, 2 * width + value_width + 3, generator=generator)
    query, key, value, _ = joint.transpose(0, 1).split([width, width, value_width, 3], dim=3)
    grad_out = torch.randn(1, 1, heads, value_width, generator=generator)
    views = Inputs(query, key, value, grad_out.expand(length, batch, heads, value_width))
    copies = Inputs(*(tensor.contiguous() for tensor in vars(views).values()))
    assert not query.is_contiguous() and not value.is_contiguous()
    ours, expected = run(views, 0.3), run(copies, 0.3)
    for name in NAMES:
        assert torch.equal(ours[name], expected[name]), name
        assert name == "max_logits" or ours[name].is_contiguous()
    assert max(largest_errors(ours, exact(copies, 0.3)).values()) < TOLERANCE


def plain_path_of_torch(
    inputs: Inputs, causal: bool, documents: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Output and gradients of torch's attention that keeps all logits, in float32."""
    leaves = [tensor.clone().requires_grad_() for tensor in list(vars(inputs).values())[:3]]
    mask = visible_keys(inputs.query.shape[0], causal, documents, inputs.query.device)
    with sdpa_kernel(SDPBackend.MATH):
        query, key, value = (leaf.permute(1, 2, 0, 3) for leaf in leaves)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    out = out.permute(2, 0, 1, 3)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    names = ("out", "grad_query", "grad_key", "grad_value")
    return dict(zip(names, (out.detach(), *grads), strict=True))


DRAWS = 8


@pytest.mark.parametrize(
    ("shape", "causal", "with_documents", "largest_logit"),
    [
        (Shape(3, 4, 8, 8, 192, 128), True, False, None),
        (Shape(150, 1, 4, 2, 192, 128), True, False, None),
        (Shape(150, 1, 2, 2, 64, 64), False, True, None),
        (Shape(520, 1, 2, 2, 192, 128), True, False, None),
        (Shape(150, 1, 4, 4, 64, 32), True, False, 30.0),
        (Shape(150, 1, 4, 4, 64, 32), True, True, 1e3),
        (Shape(150, 1, 4, 4, 64, 32), False, False, 1e4),
    ],
    ids=str,
)
def test_errors_are_no_larger_than_those_of_torchs_plain_path(
    shape: Shape, causal: bool, with_documents: bool, largest_logit: float | None
) -> None:
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for seed in range(DRAWS):
        inputs = random_inputs(shape, seed=seed, largest_logit=largest_logit)
        documents = None
        if with_documents:
            documents = random_documents(shape.batch, shape.length, seed=seed, padding=False)
        reference = exact(inputs, inputs.scale, causal, documents)
        found = run(inputs, inputs.scale, causal, documents)
        for name, value in plain_path_of_torch(inputs, causal, documents).items():
            for of_draws, result in ((ours, found[name]), (theirs, value)):
                difference = result.double() - reference[name]
                of_draws.setdefault(name, []).append(float(difference.square().mean().sqrt()))
        assert largest_errors(found, reference)["max_logits"] < 1e-6
        assert largest_errors(found, reference)["logsumexp"] < 1e-6
    for name, errors in theirs.items():
        assert not is_larger_beyond_chance(ours[name], errors), (name, ours, theirs)


@pytest.mark.parametrize("length", [1, 300])
def test_where_one_key_has_all_the_weight_nothing_is_rounded(length: int) -> None:
    inputs = random_inputs(Shape(length, 2, 2, 2, 48, 32), seed=3)
    inputs.query.copy_(100 * inputs.key)
    ours = run(inputs, inputs.scale)
    assert torch.equal(ours["out"], inputs.value)
    assert torch.equal(ours["grad_value"], inputs.grad_out)
    assert ours["grad_query"].eq(0).all() and ours["grad_key"].eq(0).all()


def test_logits_that_rise_slowly_have_their_last_as_maximum() -> None:
    length = 700
    rising = torch.linspace(0, 5, length)[:, None, None, None]
    value = torch.randn(length, 1, 1, 3, generator=torch.Generator().manual_seed(4))
    inputs = Inputs(torch.ones(length, 1, 1, 1), rising, value, torch.ones_like(value))
    for sign in (1.0, -1.0):
        signed = dataclasses.replace(inputs, key=sign * rising)
        ours = run(signed, 1.0)
        assert ours["max_logits"].item() == (5.0 if sign > 0 else 0.0)
        errors = largest_errors(ours, exact(signed, 1.0))
        assert max(errors.values()) < TOLERANCE, errors


def test_equal_logits_average_the_values() -> None:
    inputs = random_inputs(Shape(200, 1, 2, 2, 8, 8), seed=5)
    inputs.query.fill_(1.5)
    inputs.key.fill_(2.0)
    ours = run(inputs, 0.25)
    counts = torch.arange(1, 201)
    averages = inputs.value.double().cumsum(0) / counts[:, None, None, None]
    torch.testing.assert_close(ours["out"].double(), averages, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["logsumexp"][0, 0], 6.0 + counts.log(), atol=1e-6, rtol=0)
    assert ours["max_logits"].tolist() == [6.0, 6.0]


@pytest.mark.parametrize("causal", [True, False])
def test_one_token_documents_copy_their_value(causal: bool) -> None:
    inputs = random_inputs(Shape(90, 2, 4, 2, 16, 16), seed=6)
    positions = torch.arange(90, dtype=torch.int32).expand(2, 90)
    ours = run(inputs, 1.0, causal, torch.stack([positions, positions + 1]))
    assert torch.equal(ours["out"], inputs.value.repeat_interleave(2, 2))
    keys = inputs.key.repeat_interleave(2, dim=2)
    logits = (inputs.query * keys).sum(3).permute(1, 2, 0)
    torch.testing.assert_close(ours["logsumexp"], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["max_logits"], logits.amax((0, 2)), atol=1e-5, rtol=0)
    assert ours["grad_query"].eq(0).all() and ours["grad_key"].eq(0).all()


def test_padding_sees_nothing_and_gives_no_nan() -> None:
    inputs = random_inputs(Shape(70, 2, 2, 2, 16, 8), seed=7)
    positions = torch.arange(70, dtype=torch.int32).expand(2, 70)
    ours = run(inputs, 1.0, True, torch.stack([positions, positions]))
    assert ours["logsumexp"].eq(-math.inf).all() and ours["max_logits"].eq(-math.inf).all()
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert ours[name].eq(0).all(), name


@pytest.mark.parametrize("with_documents", [False, True])
def test_hidden_keys_change_no_bit(with_documents: bool) -> None:
    inputs = random_inputs(Shape(130, 1, 2, 2, 24, 16), seed=8)
    documents = torch.tensor([[[0] * 100 + [100] * 30], [[100] * 100 + [130] * 30]]).int()
    before = run(inputs, 1.0, True, documents if with_documents else None)
    inputs.key[100:] *= 1000
    inputs.value[100:] -= 7
    after = run(inputs, 1.0, True, documents if with_documents else None)
    assert torch.equal(before["out"][:100], after["out"][:100])
    assert torch.equal(before["logsumexp"][..., :100], after["logsumexp"][..., :100])
    assert torch.equal(before["grad_query"][:100], after["grad_query"][:100])
    assert not torch.equal(before["out"][100:], after["out"][100:])


def test_maxima_accumulate_in_the_callers_buffer() -> None:
    first = random_inputs(Shape(50, 2, 3, 3, 8, 8), seed=9)
    second = random_inputs(Shape(33, 1, 3, 1, 8, 8), seed=10)
    max_logits = torch.tensor([-math.inf, 100.0, -math.inf])
    for inputs in (first, second):
        forward(inputs.query, inputs.key, inputs.value, 0.5, True, None, max_logits)
    expected = torch.maximum(exact(first, 0.5)["max_logits"], exact(second, 0.5)["max_logits"])
    expected[1] = 100.0
    torch.testing.assert_close(max_logits.double(), expected, atol=1e-5, rtol=0)


def test_bfloat16_is_computed_in_float32() -> None:
    inputs = random_inputs(Shape(140, 2, 4, 2, 48, 32), seed=11, dtype=torch.bfloat16)
    documents = random_documents(2, 140, seed=11)
    ours = run(inputs, inputs.scale, True, documents)
    reference = exact(inputs, inputs.scale, True, documents)
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert ours[name].dtype == torch.bfloat16
    # Results are rounded once.
    rounded = {name: tensor.double() for name, tensor in ours.items()}
    torch.testing.assert_close(rounded["out"], reference["out"], rtol=2**-8, atol=1e-5)
    for name in ("logsumexp", "max_logits"):
        torch.testing.assert_close(rounded[name], reference[name], rtol=0, atol=1e-5)
    for name in ("grad_query", "grad_key", "grad_value"):
        torch.testing.assert_close(rounded[name], reference[name], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("shape", [Shape(300, 2, 4, 2, 48, 32), Shape(1100, 1, 1, 1, 16, 16)])
def test_every_number_of_threads_gives_the_same_bits(shape: Shape) -> None:
    inputs = random_inputs(shape, seed=12)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(inputs, 0.3))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for name in NAMES:
            assert torch.equal(result[name], results[0][name]), name


MEMORY_PROGRAM = """
import resource, torch
torch.set_num_threads(2)
from megatron_kanana.kernels.native import native_library_error
assert native_library_error() is None
ops = torch.ops.megatron_kanana
def run(length):
    query, key, value, grad = (torch.randn(length, 1, 1, 16) for _ in range(4))
    out, logsumexp = ops.flash_attention_forward(query, key, value, 0.25, True, None, None)
    ops.flash_attention_backward(
        grad, query, key, value, out, logsumexp, 0.25, True, None, True)
run(1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(32768)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    command = [sys.executable, "-c", MEMORY_PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    # Eight tensors of the call, gradients of keys and values of four chunks, and for each of two
    # threads four of rows and 64 rows of probabilities and their gradients, eight times as large as
    # a tensor. All logits would take 4 GiB.
    tensor = 32768 * 16 * 4
    assert int(result.stdout) < 44 * tensor


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_number_reaches_the_outputs_it_enters(value: float) -> None:
    inputs = random_inputs(Shape(80, 1, 2, 2, 16, 16), seed=13)
    inputs.query[40, 0, 1, 3] = value
    ours = run(inputs, 1.0)
    assert ours["out"][40, 0, 1].isnan().all() and ours["logsumexp"][0, 1, 40].isnan()
    assert not ours["max_logits"][1].isfinite() and ours["max_logits"][0].isfinite()
    assert ours["out"][:, :, 0].isfinite().all()
    assert ours["out"][:40].isfinite().all() and ours["out"][41:].isfinite().all()
    assert ours["grad_query"][40, 0, 1].isnan().all() and ours["grad_key"][:, :, 0].isfinite().all()


def test_only_the_buffer_of_maxima_is_written() -> None:
    inputs = random_inputs(Shape(20, 1, 2, 1, 8, 8), seed=14)
    documents = random_documents(1, 20)
    tensors = inputs.query, inputs.key, inputs.value
    out, logsumexp = forward(*tensors, 1.0, True, documents, None)
    torch.library.opcheck(
        forward.default, (*tensors, 1.0, True, documents, empty_maxima(2)), test_utils="test_schema"
    )
    torch.library.opcheck(
        backward.default,
        (inputs.grad_out, *tensors, out, logsumexp, 1.0, True, documents, True),
        test_utils="test_schema",
    )


def document_ranges(*ranges: tuple[int, int]) -> torch.Tensor:
    """[2, 1, tokens]."""
    return torch.tensor(ranges, dtype=torch.int32).T[:, None].contiguous()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"query": torch.zeros(4, 1, 2)}, "query must have shape [sequence, batch, heads, width]"),
    ({"query": torch.zeros(0, 1, 2, 8)}, "query must not be empty"),
    ({"query": torch.zeros(4, 1, 3, 8)}, "query must have a multiple of key's heads"),
    ({"query": torch.zeros(4, 1, 2, 8).double()}, "query must be float32 or bfloat16"),
    ({"query": torch.zeros(4, 1, 8, 2).mT}, "query must be contiguous in its last dimension"),
    ({"key": torch.zeros(5, 1, 2, 8)}, "key must have shape [4, 1, 2, 8]"),
    ({"key": torch.zeros(4, 1, 2, 9)}, "key must have shape [4, 1, 2, 8]"),
    ({"key": torch.zeros(4, 1, 2, 8).bfloat16()}, "key must be Float as query is"),
    ({"value": torch.zeros(4, 2, 2, 5)}, "value must have shape [4, 1, 2, 5]"),
    ({"value": torch.zeros(4, 1, 2, 0)}, "value must not be empty"),
    ({"scale": 0.0}, "softmax_scale must be positive"),
    ({"scale": math.inf}, "softmax_scale must be positive"),
    ({"documents": torch.zeros(2, 4).int()}, "documents must have shape [2, 1, 4]"),
    ({"documents": torch.zeros(2, 1, 4)}, "documents must be Int"),
    ({"documents": torch.zeros(4, 1, 2).int().permute(2, 1, 0)}, "documents must be contiguous"),
    ({"documents": document_ranges((0, 5), (0, 5), (0, 5), (0, 5))}, "position 0 has [0, 5)"),
    ({"documents": document_ranges((-1, 2), (-1, 2), (2, 4), (2, 4))}, "position 0 has [-1, 2)"),
    ({"documents": document_ranges((0, 2), (0, 3), (2, 4), (2, 4))}, "position 1 has [0, 3)"),
    ({"documents": document_ranges((0, 3), (0, 3), (2, 4), (2, 4))}, "must not overlap"),
    ({"documents": document_ranges((0, 3), (1, 1), (0, 3), (3, 4))}, "position 2 has [0, 3)"),
    ({"max_logits": torch.zeros(3)}, "max_logits must have shape [2]"),
    ({"max_logits": torch.zeros(2).double()}, "max_logits must be Float"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_inputs_of_the_forward_pass_are_refused_by_name(
    wrong: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(4, 1, 2, 8),
        "key": torch.zeros(4, 1, 2, 8),
        "value": torch.zeros(4, 1, 2, 5),
        "scale": 1.0,
        "causal": True,
        "documents": None,
        "max_logits": None,
    }
    with pytest.raises(RuntimeError, match=re.escape(message)):
        forward(*(arguments | wrong).values())


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("grad_out", torch.zeros(4, 1, 2, 8)),
        ("grad_out", torch.zeros(4, 1, 2, 5).bfloat16()),
        ("grad_out", torch.zeros(1, 1, 1, 1).expand(4, 1, 2, 5)),
        ("out", torch.zeros(4, 2, 2, 5)),
        ("logsumexp", torch.zeros(1, 4, 2)),
        ("logsumexp", torch.zeros(1, 2, 4).bfloat16()),
    ],
)
def test_wrong_inputs_of_the_backward_pass_are_refused_by_name(
    name: str, tensor: torch.Tensor
) -> None:
    arguments = {
        "grad_out": torch.zeros(4, 1, 2, 5),
        "query": torch.zeros(4, 1, 2, 8),
        "key": torch.zeros(4, 1, 2, 8),
        "value": torch.zeros(4, 1, 2, 5),
        "out": torch.zeros(4, 1, 2, 5),
        "logsumexp": torch.zeros(1, 2, 4),
        name: tensor,
    }
    with pytest.raises(RuntimeError, match=f"^{name} must"):
        backward(*arguments.values(), 1.0, True, None, True)

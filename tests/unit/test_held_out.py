"""Windows of held-out text: every token but the first of a window is predicted exactly once."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_kanana.data.builtin import BuiltinData
from megatron_kanana.data.held_out import cut_windows, read_held_out
from megatron_kanana.data.indexed import write_dataset
from megatron_kanana.data.tokenizer import Tokenizer, load_tokenizer
from megatron_kanana.training.perplexity import HeldOutLoss

DOCUMENTS = ["def f(x):\n    return x", "한국어 문서", "x" * 200, "\ttab \U0001f600"]


@pytest.fixture
def tokenizer(builtin: BuiltinData) -> Tokenizer:
    """The built-in tokenizer."""
    return load_tokenizer(builtin.tokenizer)


def test_windows_hold_every_token_once_and_in_order() -> None:
    generator = random.Random(0)
    for _ in range(50):
        tokens = np.array([generator.randrange(1, 99) for _ in range(generator.randrange(1, 60))])
        length = generator.randrange(2, 20)
        windows, lengths = cut_windows(tokens, length)
        parts = [window[:n] for window, n in zip(windows, lengths, strict=True)]
        assert np.concatenate(parts).tolist() == tokens.tolist()
        assert all(n == length for n in lengths[:-1])
        assert 1 <= lengths[-1] <= length
        assert not windows[-1][lengths[-1] :].any()


def test_a_file_and_its_dataset_give_the_same_windows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in [*DOCUMENTS, " "]))
    write_dataset(DOCUMENTS, tmp_path / "dataset", tokenizer.path)
    texts = [read_held_out(path, tokenizer, 33, "body") for path in (file, tmp_path / "dataset")]
    expected = [id for text in DOCUMENTS for id in [*tokenizer.encode(text), tokenizer.eod]]
    for text in texts:
        assert text.documents == 4
        assert text.num_bytes == sum(len(document.encode()) for document in DOCUMENTS)
        assert text.tokens == len(expected)
        assert text.windows.reshape(-1)[: text.tokens].tolist() == expected
        assert text.windows.shape == (-(-len(expected) // 33), 33)


def test_what_cannot_be_read_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "broken.idx").write_text("no index")
    (tmp_path / "broken.bin").write_text("")
    write_dataset(["\U0001f600 rare"], tmp_path / "other", tokenizer.path)
    tokenizer.vocab_size = 20  # as if the dataset had been made with a larger one
    cases = {
        "none.txt": "no such file, nor an indexed dataset",
        "empty.txt": "has no document",
        "broken": "is not the index of a dataset",
        "other": "which the tokenizer .* lacks",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            read_held_out(tmp_path / name, tokenizer, 8)


def test_figures_of_files_add_up() -> None:
    first = HeldOutLoss(documents=2, tokens=100, num_bytes=400, predicted=90, nats=180.0)
    second = HeldOutLoss(documents=1, tokens=50, num_bytes=100, predicted=45, nats=45.0)
    assert first.loss == 2.0
    assert first.perplexity == pytest.approx(math.e**2)
    assert first.bits_per_byte == pytest.approx(2.0 / math.log(2) / 4)
    both = first + second
    assert both.loss == pytest.approx(225 / 135)
    assert both.bits_per_byte == pytest.approx(225 / 135 / math.log(2) * 150 / 500)

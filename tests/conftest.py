"""Markers, and the data every test trains on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_kanana.data.builtin import BuiltinData, builtin_data, prepare_builtin_data

TEST_VOCAB_SIZE = 2048


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    # Cards hold the results of these; a machine without a GPU cannot repeat them.
    skip = pytest.mark.skip(reason="no CUDA device here; see benchmarks/results for its last run")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the built-in tokenizer and datasets, made once."""
    folder = tmp_path_factory.mktemp("data")
    prepare_builtin_data(builtin_data(folder, TEST_VOCAB_SIZE), TEST_VOCAB_SIZE)
    return folder


@pytest.fixture(scope="session")
def builtin(cache_dir: Path) -> BuiltinData:
    """Paths of the built-in tokenizer and datasets."""
    return builtin_data(cache_dir, TEST_VOCAB_SIZE)

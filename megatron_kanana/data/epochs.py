"""The samples of one indexed dataset, pass after pass, whatever the length of the run."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_kanana.config.dataset_files import sequence_count, tokens_before, training_sequences
from megatron_kanana.device.safe_unpickling import UnsafeFileError

from .tokenizer import Tokenizer
from .whole_folder import whole_folder

OPEN_EPOCHS = 2
FINGERPRINT_BYTES = 1 << 16  # of each end of an index file


@dataclass(frozen=True)
class SampleOrder:
    """What the order of a dataset's samples depends on, beside the dataset.

    Attributes:
        tokenizer: its end of document and padding.
        sequence_length: tokens of a sample.
        seed: of the run.
        held_out_percent: share of the documents, the last ones, that is not for training.
        cache_dir: folder for index files.
    """

    tokenizer: Tokenizer
    sequence_length: int
    seed: int
    held_out_percent: float
    cache_dir: Path


class Epochs:
    """A dataset's training samples without end: sample n is in pass n // `size`.

    Each pass puts the documents end to end in an order of its own, cuts them into samples, and
    takes these in an order of their own; both follow from the seed and the number of the pass. A
    pass is a megatron-core GPTDataset, whose index files are mapped into memory when one of its
    samples is read, so processes share them.
    """

    def __init__(self, prefix: Path, order: SampleOrder) -> None:
        self._dataset = _Dataset(prefix, order)
        tokens = tokens_before(str(prefix), self._dataset.training)
        self.size = (tokens - 1) // order.sequence_length
        self._open: dict[int, GPTDataset] = {}

    def prepare(self, epoch: int) -> None:
        """Write the index files of a pass, if they are missing; they appear when all are whole."""
        self._dataset.prepare(self._seed(epoch), held_out=False)

    def is_prepared(self, epoch: int) -> bool:
        """Whether the index files of a pass are there."""
        return self._dataset.is_prepared(self._seed(epoch), held_out=False)

    def __getitem__(self, sample: int) -> dict[str, Any]:
        epoch, within = divmod(sample, self.size)
        if epoch not in self._open:
            if len(self._open) == OPEN_EPOCHS:
                del self._open[min(self._open)]
            self._open[epoch] = self._dataset.open(self._seed(epoch), held_out=False)
        sample_of_epoch: dict[str, Any] = self._open[epoch][within]
        return sample_of_epoch

    def _seed(self, epoch: int) -> int:
        sequence = np.random.SeedSequence([self._dataset.order.seed, epoch])
        return int(sequence.generate_state(1)[0])


class HeldOut:
    """The first `size` samples of a dataset's held-out documents, as often as they are needed."""

    def __init__(self, prefix: Path, order: SampleOrder, size: int) -> None:
        self._dataset = _Dataset(prefix, order)
        self._size = size
        self._open: GPTDataset | None = None

    def prepare(self) -> None:
        """Write the index files if they are missing."""
        self._dataset.prepare(self._dataset.order.seed, held_out=True, size=self._size)

    def __getitem__(self, sample: int) -> dict[str, Any]:
        if self._open is None:
            seed = self._dataset.order.seed
            self._open = self._dataset.open(seed, held_out=True, size=self._size)
        item: dict[str, Any] = self._open[sample]
        return item


class _Dataset:
    """An indexed dataset, and the GPTDatasets made of its documents."""

    def __init__(self, prefix: Path, order: SampleOrder) -> None:
        self.order = order
        self._prefix = prefix
        self._count = sequence_count(str(prefix))
        self.training = training_sequences(self._count, order.held_out_percent)
        self._fingerprint = _fingerprint(prefix)
        self._indexed: IndexedDataset | None = None

    def prepare(self, seed: int, *, held_out: bool, size: int | None = None) -> None:
        """Write index files; they appear when all are whole."""
        if self.is_prepared(seed, held_out=held_out, size=size):
            return
        folder = self._folder(seed, held_out, size)
        first, stop = (self.training, self._count) if held_out else (0, self.training)
        documents = np.arange(first, stop, dtype=np.int32)
        with whole_folder(folder) as partial:
            self._build(partial, documents, seed, held_out, size)

    def is_prepared(self, seed: int, *, held_out: bool, size: int | None = None) -> bool:
        """Whether the index files are there.

        Raises:
            UnsafeFileError: one of them is no array of numbers.
        """
        folder = self._folder(seed, held_out, size)
        if not folder.is_dir():
            return False
        _check_arrays(folder)
        return True

    def open(self, seed: int, *, held_out: bool, size: int | None = None) -> GPTDataset:
        """A GPTDataset on index files that are there."""
        folder = self._folder(seed, held_out, size)
        if not self.is_prepared(seed, held_out=held_out, size=size):
            raise FileNotFoundError(f"the index files of {self._prefix} in {folder} are gone")
        return self._build(folder, np.empty(0, dtype=np.int32), seed, held_out, size)

    def _build(
        self, folder: Path, documents: Any, seed: int, held_out: bool, size: int | None
    ) -> GPTDataset:
        # megatron-core tells every file it opens.
        logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
        if self._indexed is None:
            self._indexed = IndexedDataset(str(self._prefix))
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self.order.sequence_length,
            blend=([str(self._prefix)], None),
            split="1,0,0",
            path_to_cache=str(folder),
            tokenizer=self.order.tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        split = Split.valid if held_out else Split.train
        return GPTDataset(self._indexed, str(self._prefix), documents, size, split, config)

    def _folder(self, seed: int, held_out: bool, size: int | None) -> Path:
        made_from = {
            "dataset": str(self._prefix),
            "fingerprint": self._fingerprint,
            "tokenizer": self.order.tokenizer.unique_identifiers,
            "documents": [self.training, self._count],
            "held_out": held_out,
            "sequence_length": self.order.sequence_length,
            "seed": seed,
            "size": size,
        }
        name = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:24]
        return self.order.cache_dir / "index" / f"{self._prefix.name}_{name}"


def _check_arrays(folder: Path) -> None:
    """Make sure that the index files are plain arrays: megatron-core would open others as pickles.

    Raises:
        UnsafeFileError: one is not.
    """
    for path in folder.glob("*.npy"):
        try:
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):
            loaded = None
        if not isinstance(loaded, np.ndarray):
            raise UnsafeFileError(
                f"{path} is no array of numbers, and nothing of it was run: delete {folder}, which"
                " is made anew"
            )


def _fingerprint(prefix: Path) -> str:
    """Tells datasets apart that have been at the same path, without reading them as a whole."""
    index = Path(f"{prefix}.idx")
    size = index.stat().st_size
    digest = hashlib.sha256(f"{size}/{Path(f'{prefix}.bin').stat().st_size}/".encode())
    with index.open("rb") as file:
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()

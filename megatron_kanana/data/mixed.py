"""The samples of a run: numbered over all of it, drawn from the sources of its mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_kanana.config import Settings
from megatron_kanana.config.mixture import Mixture
from megatron_kanana.config.proportions import Proportions

from .epochs import Epochs, HeldOut, SampleOrder
from .tokenizer import Tokenizer

SourcePaths = Mapping[str, Sequence[Path]]
"""The datasets of each source of a mixture, by its name."""


def sample_order(settings: Settings, tokenizer: Tokenizer) -> SampleOrder:
    """How a run reads its datasets."""
    data = settings.data
    return SampleOrder(
        tokenizer,
        data.sequence_length,
        settings.seed,
        data.held_out_percent,
        Path(data.cache_dir),
    )


class _Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """A number of samples, with `segment_ids` if documents are to be kept apart."""

    def __init__(self, order: SampleOrder, total: int, *, document_mask: bool) -> None:
        self._total = total
        self._end_of_document = order.tokenizer.eod
        self.has_segment_ids = document_mask

    def __len__(self) -> int:
        return self._total

    def _with_segments(self, sample: dict[str, Any]) -> dict[str, Any]:
        if not self.has_segment_ids:
            return sample
        return {**sample, "segment_ids": document_segments(sample["tokens"], self._end_of_document)}


class MixedSamples(_Samples):
    """Training samples: which one has a number follows from number, mixture and order alone.

    The datasets of a source are read side by side, each at a rate by its size.

    Args:
        mixture: source and place in it of every sample.
        paths: the datasets of each source.
        order: how each dataset is read.
        total: samples of the run.
        document_mask: whether samples have `segment_ids`.
    """

    def __init__(
        self,
        mixture: Mixture,
        paths: SourcePaths,
        order: SampleOrder,
        total: int,
        *,
        document_mask: bool,
    ) -> None:
        super().__init__(order, total, document_mask=document_mask)
        self._mixture = mixture
        self._sources = [_Source(paths[name], order) for name in mixture.names]

    def __getitem__(self, sample: int) -> dict[str, Any]:
        source, index = self._mixture.place(sample)
        return self._with_segments(self._sources[source][index])

    def missing(self, consumed: int) -> list[tuple[Path, int]]:
        """Passes without index files that samples from `consumed` on need: dataset and number."""
        begin, end = self._mixture.counts(consumed), self._mixture.counts(self._total)
        return [
            missing
            for source, first, stop in zip(self._sources, begin, end, strict=True)
            for missing in source.missing(int(first), int(stop))
        ]


class HeldOutSamples(_Samples):
    """Samples of the sources' held-out documents, by the shares at the beginning of the run.

    Args:
        mixture, paths, order, document_mask: as for `MixedSamples`.
        total: samples of one evaluation.
    """

    def __init__(
        self,
        mixture: Mixture,
        paths: SourcePaths,
        order: SampleOrder,
        total: int,
        *,
        document_mask: bool,
    ) -> None:
        super().__init__(order, total, document_mask=document_mask)
        datasets: list[Path] = []
        weights: list[float] = []
        for name, share in zip(mixture.names, mixture.first_shares, strict=True):
            sizes = [Epochs(path, order).size for path in paths[name]]
            datasets += paths[name]
            weights += [share * size / sum(sizes) for size in sizes]
        self._proportions = Proportions(weights)
        counts = self._proportions.counts(total)
        self._datasets = [
            HeldOut(path, order, int(count)) if count else None
            for path, count in zip(datasets, counts, strict=True)
        ]

    def __getitem__(self, sample: int) -> dict[str, Any]:
        owners, indices = self._proportions.window(sample, sample + 1)
        dataset = self._datasets[int(owners[0])]
        assert dataset is not None
        return self._with_segments(dataset[int(indices[0])])

    def prepare(self) -> None:
        """Write the index files; on one process only."""
        for dataset in self._datasets:
            if dataset is not None:
                dataset.prepare()


class _Source:
    """The samples of one source, each dataset's share of them by its size."""

    def __init__(self, paths: Sequence[Path], order: SampleOrder) -> None:
        self._paths = paths
        self._datasets = [Epochs(path, order) for path in paths]
        self._proportions = Proportions([dataset.size for dataset in self._datasets])

    def __getitem__(self, sample: int) -> dict[str, Any]:
        owners, indices = self._proportions.window(sample, sample + 1)
        return self._datasets[int(owners[0])][int(indices[0])]

    def missing(self, first: int, stop: int) -> Iterator[tuple[Path, int]]:
        """Passes without index files that the samples from `first` up to `stop` need."""
        begin, end = self._proportions.counts(first), self._proportions.counts(stop)
        for path, dataset, of_first, of_stop in zip(
            self._paths, self._datasets, map(int, begin), map(int, end), strict=True
        ):
            if of_stop > of_first:
                for number in range(of_first // dataset.size, -(-of_stop // dataset.size)):
                    if not dataset.is_prepared(number):
                        yield path, number


def prepare_pass(path: Path, number: int, order: SampleOrder) -> None:
    """Write the index files of one of a dataset's passes.

    Where torch.distributed is at work only its first process may do so: megatron-core writes none
    on others.
    """
    Epochs(path, order).prepare(number)


def document_segments(tokens: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """Which document of its sample each token is in, counted from 0: int32 [..., sequence].

    The end-of-document token is in the document that it ends.
    """
    ends = (tokens == end_of_document).to(torch.int32)
    return torch.cumsum(ends, dim=-1, dtype=torch.int32) - ends

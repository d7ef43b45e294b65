"""Packing conversations into samples: several in one, none cut."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt


def pack(
    lengths: npt.NDArray[np.int64], capacity: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Deal items out to as few samples as best-fit decreasing finds.

    The longest come first, each into the fullest sample that has room; equally long ones are in an
    order drawn from the seed.

    Args:
        lengths: int64 [items], at most `capacity` each.
        capacity: of a sample.
        seed: of the order.

    Returns:
        the items sample by sample, int64 [items]; and where each sample begins among them, int64
        [samples + 1], the last being the number of items.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    samples: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # samples by what is left in them
    rooms: list[int] = []  # the keys of `with_room`, ascending
    for item in order.tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            sample, room = len(samples), capacity
            samples.append([])
        else:
            room = rooms[place]
            sample = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        samples[sample].append(item)
        left = room - length
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(sample)
    begins = np.cumsum([0, *map(len, samples)], dtype=np.int64)
    items = np.array([item for sample in samples for item in sample], dtype=np.int64)
    return items, begins

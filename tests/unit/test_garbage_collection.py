"""Garbage is left alone while much is loaded, and found again afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from megatron_kanana.garbage_collection import garbage_collection_off


class Knot:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_it_was_afterwards(was_on: bool) -> None:
    if not was_on:
        gc.disable()
    try:
        with pytest.raises(KeyError), garbage_collection_off():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


@pytest.mark.parametrize("lasting", [True, False])
def test_what_lasts_is_looked_through_no_more_and_what_comes_later_is(lasting: bool) -> None:
    try:
        with garbage_collection_off(lasting=lasting):
            early = weakref.ref(Knot())
        late = weakref.ref(Knot())
        gc.collect()
        assert (early() is not None) == lasting
        assert late() is None
    finally:
        gc.unfreeze()
        gc.collect()

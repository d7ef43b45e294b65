"""The optimizer's part of a checkpoint: what must be in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_kanana.checkpoint.optimizer_state import check_stored
from megatron_kanana.config import ConfigurationError
from megatron_kanana.optimizer.whole_state import Entry


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_state_of_another_optimizer_is_refused_with_a_remedy(tmp_path: Path) -> None:
    tensor = torch.zeros(2)
    save({"optimizer.state.exp_avg.a": tensor}, storage_writer=FileSystemWriter(tmp_path))
    wanted = {
        Entry(state, 0, "a"): ShardedTensor.from_rank_offsets(f"optimizer.state.{state}.a", tensor)
        for state in ("exp_avg", "momentum")
    }
    check_stored({Entry("exp_avg", 0, "a"): wanted[Entry("exp_avg", 0, "a")]}, tmp_path, "muon")
    with pytest.raises(
        ConfigurationError, match=r"= muon(.|\n)*lacks 1 .*momentum\.a.*adamw_kinds"
    ):
        check_stored(wanted, tmp_path, "muon")

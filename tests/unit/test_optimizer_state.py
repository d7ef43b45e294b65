"""The optimizer's part of a checkpoint: what must be in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_kanana.checkpoint.optimizer_state import OtherOptimizerError, check_stored
from megatron_kanana.optimizer.whole_state import Entry


def test_state_of_another_optimizer_is_refused_with_a_remedy(tmp_path: Path) -> None:
    tensor = torch.zeros(2)
    save({"optimizer.state.exp_avg.a": tensor}, storage_writer=FileSystemWriter(tmp_path))
    wanted = {
        Entry(state, 0, "a"): ShardedTensor.from_rank_offsets(f"optimizer.state.{state}.a", tensor)
        for state in ("exp_avg", "momentum")
    }
    check_stored({Entry("exp_avg", 0, "a"): wanted[Entry("exp_avg", 0, "a")]}, tmp_path)
    with pytest.raises(OtherOptimizerError, match=r"lacks 1 .*momentum\.a.*adamw_kinds"):
        check_stored(wanted, tmp_path)

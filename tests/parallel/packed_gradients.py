"""Gradients of documents packed into samples, and of each document alone, in layouts in turn.

Argument: JSON, a list of [port for the processes to meet at, file to write, overrides]. The file
gets the largest relative difference of any parameter's gradient over all processes, and what
layouts are compared by.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_kanana import device
from megatron_kanana.config import Settings, detect_environment, load_settings
from tests.launch import CONFIG_DIR

LENGTH = 64
PACKED_LENGTHS = ((5, 30, 17), (40, 9, 15))  # the first sample ends with padding
Batch = dict[str, torch.Tensor]


def main(jobs: list[tuple[int, str, list[str]]]) -> None:
    """Compare in each layout."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it remembers the layout before
    for port, output, overrides in jobs:
        os.environ["MASTER_PORT"] = str(port)
        words = ["experiment=small", "device=cpu", "model.num_mtp_layers=1", *overrides]
        words.append("model.expert_bias_update_rate=0")  # every pass routes alike
        settings = load_settings(words, detect_environment(), str(CONFIG_DIR))
        compare(settings, Path(output))
        from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

        unset_num_microbatches_calculator()


def compare(settings: Settings, output: Path) -> None:
    """Run one layout."""
    where = device.prepare_device(settings, detect_environment())
    device.initialize_process_groups(settings, where)
    from megatron_kanana.training.run import build_run

    run = build_run(settings, where)
    documents = [document(length, seed) for seed, length in enumerate(sum(PACKED_LENGTHS, ()))]
    per_sample = len(PACKED_LENGTHS[0])
    packed = [pack(documents[:per_sample]), pack(documents[per_sample:])]
    found: dict[str, Any] = {"with balance losses": summary(run, gradients(run, packed))}
    # Means over a sample, of which there are fewer when documents are packed.
    run.config.moe_z_loss_coeff, run.config.moe_aux_loss_coeff = None, 0.0
    together = gradients(run, packed)
    alone = gradients(run, [alone_padded(each) for each in documents])
    found["difference"] = difference(together, alone)
    if dist.get_world_size() == 1:
        exact = gradients(run, [alone_exact(each) for each in documents])
        found["difference from exact lengths"] = difference(together, exact)
        found["loads are those of exact lengths"] = together["loads"][:-1] == exact["loads"][:-1]
    if dist.get_rank() == dist.get_world_size() - 1:
        output.write_text(json.dumps(found))
    device.destroy_process_groups()


def document(length: int, seed: int) -> Batch:
    """Random tokens, labels and which of them count, [length] each; at least one counts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 2048, (length + 1,), generator=generator)
    mask = (torch.rand(length, generator=generator) < 0.3 + 0.1 * seed).float()
    mask[length // 2] = 1.0
    return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask}


def pack(documents: list[Batch]) -> Batch:
    """One sample, filled up with padding."""
    ids = [torch.full_like(each["tokens"], n) for n, each in enumerate(documents)]
    joined = {name: torch.cat([each[name] for each in documents]) for name in documents[0]}
    return padded({**joined, "segment_ids": torch.cat(ids)})


def alone_padded(document: Batch) -> Batch:
    """One sample of the full length whose documents are not told apart from padding."""
    return padded(document)


def alone_exact(document: Batch) -> Batch:
    """One sample of the document's own length."""
    return {name: tensor[None] for name, tensor in document.items()}


def padded(sample: Batch) -> Batch:
    """[1, LENGTH] each."""
    missing = LENGTH - len(sample["tokens"])
    fill = {"tokens": 1, "labels": 1, "loss_mask": 0, "segment_ids": -1}
    return {
        name: torch.nn.functional.pad(tensor, (0, missing), value=fill[name])[None]
        for name, tensor in sample.items()
    }


def gradients(run: Any, samples: list[Batch]) -> dict[str, Any]:
    """Loss, gradients by parameter and tokens an expert of one global batch of these samples."""
    from megatron.core import parallel_state

    from megatron_kanana.training.loss_weights import weigh_alike
    from megatron_kanana.training.metrics import local_loss_share
    from megatron_kanana.training.step import run_schedule

    ranks, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    mine = samples[rank::ranks]
    for each in mine:
        each["position_ids"] = torch.arange(each["tokens"].shape[1])[None]
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    counted: dict[str, Any] = {}

    def finalize(model: list[Any], *args: Any, **_: Any) -> None:
        # Whole gradients on every data-parallel process, though its optimizer would need a part.
        run.expert_loads.finalize_model_grads(model, *args, force_all_reduce=True)

    run.config.finalize_model_grads_func = finalize
    iterators = weigh_alike(run, [iter(mine) for _ in run.chunks], len(mine))
    losses = run_schedule(run, iterators, len(mine), forward_only=False)
    share = local_loss_share(losses, torch.device("cpu"))
    dist.all_reduce(share)
    loads = torch.zeros(5, 8)
    for layer, load in run.expert_loads.loads.items():
        loads[layer - 1] = load
    dist.all_reduce(loads)
    counted["loss"], counted["loads"] = float(share), loads.tolist()
    counted["gradients"] = {
        f"{index} {name}": parameter.main_grad.clone()
        for index, chunk in enumerate(run.chunks)
        for name, parameter in chunk.named_parameters()
    }
    counted["max logits"] = run.attention_logits.reduce().amax(1).tolist()
    return counted


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Largest difference of a parameter's gradient over its largest entry, over all processes."""
    worst = abs(ours["loss"] / theirs["loss"] - 1.0)
    for name, gradient in ours["gradients"].items():
        other = theirs["gradients"][name]
        worst = max(worst, float((gradient - other).abs().max() / other.abs().max().clamp(1e-12)))
    found = torch.tensor(worst)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def summary(run: Any, counted: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in every layout."""
    from megatron_kanana.optimizer.update import gradient_norm_and_loss

    share = torch.tensor(counted["loss"] / dist.get_world_size(), dtype=torch.float64)
    norm, loss = gradient_norm_and_loss(run.optimizer, share)
    _, of_megatron_core, _ = run.optimizer.step()
    assert math.isclose(norm, float(of_megatron_core), rel_tol=1e-6)
    return {
        "loss": loss,
        "grad_norm": norm,
        "loads": counted["loads"],
        "max logits": counted["max logits"],
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

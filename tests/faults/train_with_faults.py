"""As train_in_turn.py, with numbers made wrong in chosen steps of chosen processes.

Arguments: a JSON of {run: [fault, ...]}, and that of train_in_turn.py. A run that ends with a
status other than 0 leaves it in the file `status` of its folder, and the next one begins.

A fault is {rank, sample, module, where, times}: on the process of that rank, in the step that
begins with that sample, at the module whose path in its model chunk ends with `module`, for the
first `times` passes:

    output           one element of the output is NaN
    gradient         one element of the gradient of the output is NaN
    weight_gradient  the gradient of the module's weight is NaN
    flipped_bit      one element of the gradient of the weight is a little larger
    factor           the output is multiplied by 30: a large loss, but a finite one
    exit             the process ends at once
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_kanana import train
from tests import train_in_turn

Fault = dict[str, Any]


def main(faults: dict[str, list[Fault]], jobs: list[tuple[int, list[str]]]) -> int:
    """Run the jobs; returns 0."""
    run_job = train.main

    def run_with_faults(arguments: list[str] | None = None) -> int:
        watch(faults)
        status = run_job(arguments)
        if status:
            import torch.distributed as dist

            values = dict(word.split("=", 1) for word in arguments or [] if "=" in word)
            if dist.get_rank() == 0:
                folder = Path(values["output_dir"]) / values["run_name"]
                (folder / "status").write_text(str(status))
            from megatron_kanana import device

            device.destroy_process_groups()
        return 0

    vars(train)["main"] = run_with_faults
    return train_in_turn.main(jobs)


def watch(faults: dict[str, list[Fault]]) -> None:
    """Put the faults into each run as soon as it is built."""
    # Before megatron-core is imported, as the job itself does.
    from megatron_kanana.device.patches import apply_patches

    apply_patches("cpu")
    from megatron_kanana.training import run as runs

    if hasattr(runs.build_run, "with_faults"):
        return
    build_run = runs.build_run

    def build_with_faults(*arguments: Any) -> Any:
        run = build_run(*arguments)
        for fault in faults.get(run.settings.run_name, []):
            put_in(run, fault)
        return run

    vars(build_with_faults)["with_faults"] = True
    vars(runs)["build_run"] = build_with_faults


def after_gradient(parameter: Any, function: Callable[[Any], None]) -> None:
    """Call `function` with a parameter each time its gradient has been added to `main_grad`."""
    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: function(parameter))
    vars(parameter)["gradient_node"] = node  # keeps the hook


def put_in(run: Any, fault: Fault) -> None:
    """Hook a fault onto its module, if it is on this process."""
    import torch
    import torch.distributed as dist
    from megatron.core.utils import unwrap_model

    if fault["rank"] != dist.get_rank():
        return
    passes: set[int] = set()
    forwards = [0]

    def is_due() -> bool:
        """Whether the pass at hand is to go wrong."""
        if run.consumed_samples != fault["sample"]:
            return False
        size = run.settings.num_microbatches(dist.get_world_size(), run.global_batch_size)
        passes.add((forwards[0] - 1) // size)
        return len(passes) <= int(fault["times"])

    def spoiled(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.clone(memory_format=torch.contiguous_format)
        result.view(-1)[result.numel() // 3] = math.nan
        return result

    def count(*_: Any) -> None:
        if run.consumed_samples == fault["sample"] and torch.is_grad_enabled():
            forwards[0] += 1

    def after_forward(module: Any, _: Any, output: Any) -> Any:
        if not torch.is_grad_enabled() or not is_due():
            return output
        first, *rest = output if isinstance(output, tuple) else (output,)
        if fault["where"] == "output":
            first = spoiled(first)
        elif fault["where"] == "factor":
            first = first * 30.0
        elif fault["where"] == "exit":
            os._exit(9)
        else:
            first.register_hook(spoiled)
        return (first, *rest) if isinstance(output, tuple) else first

    def of_weight(gradient: torch.Tensor) -> torch.Tensor:
        if not is_due():
            return gradient
        return gradient * math.nan if fault["where"] == "weight_gradient" else gradient * 1.0001

    def spoil_expert(down: Any) -> None:
        if is_due():
            down.main_grad[1].mul_(math.nan)

    for chunk in run.chunks:
        for path, module in unwrap_model(chunk).named_modules():
            if path.endswith(fault["module"]):
                module.register_forward_hook(count)
                if path.endswith("mlp.experts") and fault["where"] == "weight_gradient":
                    after_gradient(module.down, spoil_expert)
                elif fault["where"] in ("weight_gradient", "flipped_bit"):
                    module.weight.register_hook(of_weight)
                else:
                    module.register_forward_hook(after_forward)
                return
    raise AssertionError(f"rank {fault['rank']} has no module {fault['module']}")


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), json.loads(sys.argv[2])))

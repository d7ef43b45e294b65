"""Find out what every process of a large job would hold, before there is a cluster.

    python -m tools.plan --dry-run --processes 512 experiment=kanana_2_155b_a17b
    python -m tools.plan --dry-run --processes 512 --ranks 0,63,511 model=kanana_2_30b_a3b …

The configuration is checked as for a real start, but for files, which may be on the cluster. Then
megatron-core's modules are built for each of the ranks, with the sizes and placements of the real
job and without memory for weights. Sizes are of weights, gradients and optimizer state; activations
are not among them. `--ranks all` also shows that all processes together hold the model exactly.

Exit code 1 if they do not; 2 for a configuration that cannot run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    Settings,
    detect_environment,
    load_settings,
    tell,
)

if TYPE_CHECKING:
    from megatron_kanana.planning.dry_run import ProcessPlan

GIB = 2**30
HEADINGS = (
    *("rank", "tensor", "stage", "expert", "data", "parameters", "AdamW's"),
    *("weights", "gradients", "optimizer", "GiB in all", "layers"),
)


def main(arguments: list[str] | None = None) -> int:
    """Check, build and report; returns the exit code."""
    options = parse_arguments(arguments)
    environment = Environment(
        world_size=options.processes,
        local_world_size=min(options.processes, options.processes_per_node),
        cuda_device_count=options.processes_per_node,
        megatron_core_version=detect_environment().megatron_core_version,
    )
    try:
        settings = load_settings(
            options.overrides, environment, options.config_dir, with_files=False
        )
    except ConfigurationError as error:
        return tell(error, 0)
    ranks = chosen_ranks(options.ranks, settings, options.processes)
    if ranks is None:
        print(
            f"--ranks {options.ranks}: give 'stages', 'all', or ranks below --processes"
            f" {options.processes} with commas between them",
            file=sys.stderr,
        )
        return 2
    return report(settings, options.processes, ranks, options.json)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command-line options; everything else is an override of the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="group=name or setting=value")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("--dry-run", action="store_true", required=True, help="build the ranks")
    parser.add_argument("--processes", type=int, required=True, help="GPUs of the whole job")
    parser.add_argument("--processes-per-node", type=int, default=8, help="GPUs of a node (8)")
    parser.add_argument(
        "--ranks", default="stages", help="stages (one process of each), all, or 0,63,…"
    )
    parser.add_argument("--json", type=Path, help="file for everything that was found")
    return parser.parse_intermixed_args(arguments)


def chosen_ranks(text: str, settings: Settings, processes: int) -> list[int] | None:
    """The ranks that `--ranks` means; None if it means none."""
    from megatron_kanana.planning.dry_run import first_of_each_stage

    if text == "stages":
        return first_of_each_stage(settings, processes)
    if text == "all":
        return list(range(processes))
    words = text.split(",")
    if not all(word.isdecimal() and int(word) < processes for word in words):
        return None
    return [int(word) for word in words]


def report(settings: Settings, processes: int, ranks: Sequence[int], path: Path | None) -> int:
    """Print a line for each rank, and what is wrong if all were built; returns the exit code."""
    from megatron_kanana.planning.dry_run import Coverage, dry_run

    coverage = Coverage()
    plans = []
    row = "{:>6}{:>7}{:>6}{:>7}{:>5}{:>16}{:>14}{:>9}{:>10}{:>10}{:>11}  {}"
    print(row.format(*HEADINGS))
    for plan in dry_run(settings, processes, ranks, coverage):
        plans.append(plan)
        size = {name: count / GIB for name, count in plan.state_bytes(settings).items()}
        adamw = sum(count for (_, name), count in plan.parameters.items() if name == "adamw")
        print(
            row.format(
                plan.rank,
                plan.tensor_rank,
                plan.pipeline_rank,
                plan.expert_rank,
                plan.data_rank,
                f"{plan.num_parameters:,}",
                f"{adamw:,}",
                *(f"{size[name]:.2f}" for name in ("weights", "gradients", "optimizer")),
                f"{sum(size.values()):.2f}",
                " | ".join(_short(stage) for stage in plan.stages),
            ),
            flush=True,
        )
    imbalance = {
        group: max(plan.orthogonalization_imbalance.get(group, 0.0) for plan in plans)
        for group in ("dense", "experts")
    }
    for group, factor in imbalance.items():
        if factor:
            print(f"Muon, {group}: the busiest process has {factor:.2f} times the mean work")
    problems = coverage.problems(settings) if len(ranks) == processes else []
    for problem in problems:
        print(problem, file=sys.stderr)
    if len(ranks) == processes and not problems:
        total = sum(coverage.volumes.values())
        print(f"all processes: {total:,} parameters, each with one place and one writer")
    if path is not None:
        found = {
            "processes": processes,
            "ranks": [_as_json(plan, settings) for plan in plans],
            "problems": problems,
        }
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if problems else 0


def _short(stage: Sequence[str]) -> str:
    """'embedding 1-8', for a stage's contents."""
    layers = [name for name in stage if name.isdecimal()]
    span = [] if not layers else [layers[0] if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"]
    first = [name for name in stage if name == "embedding"]
    last = [name for name in stage if not name.isdecimal() and name != "embedding"]
    return " ".join([*first, *span, *last])


def _as_json(plan: ProcessPlan, settings: Settings) -> dict[str, object]:
    values = dataclasses.asdict(plan)
    values["parameters"] = {
        f"{group}, {optimizer}": count for (group, optimizer), count in plan.parameters.items()
    }
    return {**values, "bytes": plan.state_bytes(settings)}


if __name__ == "__main__":
    sys.exit(main())

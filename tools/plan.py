"""Plan a large job before there is a cluster: memory, time and cost, layouts, a dry run.

    python -m tools.plan --processes 512 experiment=kanana_2_155b_a17b parallel=h200_512
    python -m tools.plan --search --processes 512 --plot found.png experiment=kanana_2_155b_a17b
    python -m tools.plan --dry-run --processes 512 --ranks 0,63,511 experiment=kanana_2_155b_a17b
    python -m tools.plan --errors

The configuration is checked as for a real start, but for files, which may be on the cluster.

Without a mode, memory, step time, days and GPU-hours of the run are predicted from its settings,
for the GPUs of --machine. --search does so for every layout that a real start would not refuse, and
lists the fastest of those that fit. --errors puts predictions beside what was measured.

--dry-run builds megatron-core's modules for each of the ranks, with the sizes and placements of the
real job and without memory for weights. `--ranks all` also shows that all processes together hold
the model exactly.

Exit code 1 if they do not, or if nothing fits; 2 for a configuration that cannot run.
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
    Problem,
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
    """Check, predict or build, and report; returns the exit code."""
    options = parse_arguments(arguments)
    if options.errors:
        return report_errors(options)
    environment = Environment(
        world_size=options.processes,
        local_world_size=min(options.processes, options.processes_per_node),
        cuda_device_count=options.processes_per_node,
        gpu_name=options.machine,
        compute_capability=(10, 0) if options.machine == "b200" else (9, 0),
        megatron_core_version=detect_environment().megatron_core_version,
    )
    try:
        settings = load_settings(
            options.overrides, environment, options.config_dir, with_files=False
        )
        if not options.dry_run:
            return report_plan(settings, environment, options)
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
    return report_dry_run(settings, options.processes, ranks, options.json)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command-line options; everything else is an override of the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="group=name or setting=value")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="build the ranks")
    mode.add_argument("--search", action="store_true", help="look for the fastest layouts")
    mode.add_argument("--errors", action="store_true", help="predictions beside measurements")
    parser.add_argument("--processes", type=int, help="GPUs of the whole job")
    parser.add_argument("--processes-per-node", type=int, default=8, help="GPUs of a node (8)")
    parser.add_argument("--json", type=Path, help="file for everything that was found")
    dry_run = parser.add_argument_group("with --dry-run")
    dry_run.add_argument(
        "--ranks", default="stages", help="stages (one process of each), all, or 0,63,…"
    )
    plan = parser.add_argument_group("for predictions")
    plan.add_argument("--machine", default="h200", help="h100, h200 (the default) or b200")
    plan.add_argument(
        "--machine-value",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of one's own, such as network_bandwidth=25e9; see planning/machines.py",
    )
    plan.add_argument(
        "--implementation",
        default="megatron_kanana",
        choices=("megatron_kanana", "transformer_engine", "transformer_engine_deepep"),
        help="who computes the layers: this version (the default), or megatron-core's with"
        " Transformer Engine, with or without DeepEP",
    )
    plan.add_argument(
        "--fp8",
        action="store_true",
        help="projections and experts in fp8, for another --implementation than this version,"
        " which precision tells",
    )
    plan.add_argument(
        "--expert-load",
        type=float,
        default=1.0,
        help="tokens that come to the busiest process's experts, over the mean (1)",
    )
    plan.add_argument("--tokens", type=float, help="of the run; the settings' by default")
    search = parser.add_argument_group("with --search")
    search.add_argument(
        "--global-batch-size", type=int, help="sequences; the last one's by default"
    )
    search.add_argument("--top", type=int, default=15, help="how many to show (15)")
    search.add_argument("--plot", type=Path, help="PNG file for a picture of them")
    errors = parser.add_argument_group("with --errors")
    errors.add_argument(
        "--leave-one-out", action="store_true", help="fit again without each figure: a minute"
    )
    errors.add_argument(
        "--fit",
        action="store_true",
        help="print what numbers of calibration.py fit this version's figures best",
    )
    errors.add_argument(
        "--table-in", type=Path, help="Markdown file whose table of errors is written anew"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.processes is None and not options.errors:
        parser.error("--processes is needed: GPUs of the whole job")
    return options


def report_errors(options: argparse.Namespace) -> int:
    """Print predictions beside measurements; returns the exit code."""
    from megatron_kanana.planning.errors import compare
    from megatron_kanana.planning.report import (
        comparison_lines,
        comparison_values,
        fit_lines,
        with_table,
    )

    comparisons = compare(leave_one_out=options.leave_one_out)
    lines = list(comparison_lines(comparisons))
    print("\n".join(lines))
    if options.fit:
        print("\n".join(fit_lines()))
    if options.table_in is not None:
        text = options.table_in.read_text(encoding="utf-8")
        options.table_in.write_text(with_table(text, lines), encoding="utf-8")
    _write(options.json, comparison_values(comparisons))
    return 0


def report_plan(settings: Settings, environment: Environment, options: argparse.Namespace) -> int:
    """Print the prediction of the run, or of the layouts found; returns the exit code.

    Raises:
        ConfigurationError: the machine is not known, one of its values is wrong, or --fp8 is given
            for this version.
    """
    from megatron_kanana.planning.calibration import IMPLEMENTATIONS, KANANA
    from megatron_kanana.planning.machines import machine_named
    from megatron_kanana.planning.plan import plan_run
    from megatron_kanana.planning.report import plan_lines, run_values, search_lines, search_values
    from megatron_kanana.planning.search import search

    machine = machine_named(options.machine, machine_values(options.machine_value))
    if (parts := settings.parallel.context_parallel_size) > 1:
        name, reason = "parallel.context_parallel_size", "is not among what is predicted"
        raise ConfigurationError([Problem(name, parts, reason, "plan with 1, or use --dry-run")])
    implementation = IMPLEMENTATIONS[options.implementation]
    if options.fp8 and implementation is KANANA:
        remedy = (
            "set precision=fp8_blockwise, or another of its recipes, or another --implementation"
        )
        raise ConfigurationError([Problem("--fp8", True, "is not for this version", remedy)])
    if not options.search:
        run = plan_run(
            settings,
            environment.world_size,
            machine,
            implementation,
            tokens=options.tokens,
            fp8=options.fp8,
            expert_load=options.expert_load,
        )
        print("\n".join(plan_lines(run)))
        _write(options.json, run_values(run))
        return 0 if all(plan.fits for _, plan in run.plans) else 1
    sizes = [change.global_batch_size for change in settings.schedule.batch_size_changes]
    size = options.global_batch_size or [settings.schedule.global_batch_size, *sizes][-1]
    found = search(
        settings,
        environment,
        machine,
        implementation,
        global_batch_size=size,
        fp8=options.fp8,
        expert_load=options.expert_load,
    )
    print("\n".join(search_lines(found, options.top)))
    _write(options.json, search_values(found))
    if options.plot is not None and found:
        from megatron_kanana.planning.plot import plot_search

        plot_search(found, options.plot, options.top)
    return 0 if found else 1


def machine_values(words: Sequence[str]) -> dict[str, float]:
    """Values from words such as 'network_bandwidth=25e9'.

    Raises:
        ConfigurationError: a word is none of those.
    """
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            problem = Problem("--machine-value", word, "is no value", "write NAME=NUMBER")
            raise ConfigurationError([problem]) from None
    return values


def _write(path: Path | None, found: object) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


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


def report_dry_run(
    settings: Settings, processes: int, ranks: Sequence[int], path: Path | None
) -> int:
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
    found = {
        "processes": processes,
        "ranks": [_as_json(plan, settings) for plan in plans],
        "problems": problems,
    }
    _write(path, found)
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

"""The example scripts: clean, right at full scale, and at tiny scale a model that calls tools."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_kanana.config import load_settings, read_settings
from megatron_kanana.config.batch_sizes import samples_of_steps
from megatron_kanana.config.environment import Environment
from tests.launch import ROOT, Finished, run_python

EXAMPLE = ROOT / "examples" / "kanana_2_155b_a17b"
SCRIPTS = sorted(EXAMPLE.glob("*.sbatch"))
SECONDS = 240
"""What all scripts together may take at tiny scale on two cores that nobody else uses."""

STAGES = ("STAGE_1_END", "BATCH_SWITCH_END", "MIXTURE_SWITCH_END", "PRETRAINING_END")


def bash(script: str, **variables: str) -> Finished:
    """Run a script of the example as a user does, from another folder."""
    python = Path(sys.executable).parent
    path = os.pathsep.join([str(python), os.environ["PATH"]])
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(EXAMPLE / script)],
        env={**outside, "PATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=3 * SECONDS,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def shell_values(scale: str, *names: str) -> list[str]:
    """What settings.sh sets, lists as words."""
    lines = "; ".join(f'echo "${{{name}[*]}}"' for name in names)
    command = f"cd {EXAMPLE} && SCALE={scale} DRY_RUN=1 && . ./settings.sh && {lines}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def directives(script: str) -> set[str]:
    """Options of sbatch that a script names."""
    return {line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")}


def without_names(script: str) -> set[str]:
    """What a script asks of SLURM, but for names and the numbers of an array."""
    own = ("--job-name", "--output", "--array")
    return {each for each in directives(script) if not each.startswith(own)}


def shell_scripts() -> list[Path]:
    """Every script of the repository; those that are templates have a test of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (ROOT / name for name in listed.stdout.splitlines() if not name.endswith(".jinja"))
    return [path for path in paths if path.is_file() and is_shell(path)]


def is_shell(path: Path) -> bool:
    """By its name, or by its first line."""
    if path.suffix in (".sh", ".sbatch"):
        return True
    with path.open("rb") as file:
        return re.match(rb"#!.*\b(ba)?sh\n", file.readline()) is not None


def test_every_shell_script_is_clean() -> None:
    scripts = list(shell_scripts())
    assert {*SCRIPTS, EXAMPLE / "settings.sh", EXAMPLE / "run_all.sh"} <= set(scripts)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a dry run of the whole real run prints, and the folder of what it renders."""
    folder = tmp_path_factory.mktemp("full")
    finished = bash("run_all.sh", DRY_RUN="1", RUNS=str(folder))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout, folder / "dry_run"


def test_every_configuration_of_the_real_run_is_valid_and_asks_for_the_nodes_of_its_script(
    dry_run: tuple[str, Path],
) -> None:
    printed, folder = dry_run
    widths, rates = shell_values("full", "WIDTHS", "RATES")
    proxies = [f"proxy_{width}_{rate}" for width in widths.split() for rate in rates.split()]
    scripts = {
        **dict.fromkeys(proxies, "04_proxy_sweep"),
        "kanana_2_155b_a17b": "06_stage_1",
        "kanana_2_155b_midtraining": "10_midtraining",
        "kanana_2_155b_long_context": "11_context_extension",
        "kanana_2_155b_sft": "12_sft",
    }
    assert {path.name for path in folder.iterdir()} == set(scripts)
    for run, script in scripts.items():
        rendered = (folder / run / "cluster" / "train.sbatch").read_text()
        assert without_names(rendered) == without_names((EXAMPLE / f"{script}.sbatch").read_text())
    assert f"--array=0-{len(proxies) - 1}" in directives((EXAMPLE / SCRIPTS[3]).read_text())
    assert "--array=0-9" in directives((EXAMPLE / SCRIPTS[1]).read_text())
    same = (EXAMPLE / "06_stage_1.sbatch").read_text()
    for name in ("07_batch_switch", "08_mixture_switch", "09_stage_2_decay"):
        other = (EXAMPLE / f"{name}.sbatch").read_text()
        assert directives(other) - directives(same) == {f"--job-name={name}"}
        assert f"== {name}.sbatch took" in printed


@pytest.mark.parametrize("script", ["02_midtraining", "03_sft"])
def test_configurations_of_the_30b_are_valid(script: str, tmp_path: Path) -> None:
    path = ROOT / "examples" / "kanana_2_30b_a3b" / f"{script}.sbatch"
    finished = bash(str(path), DRY_RUN="1", RUNS=str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert without_names(finished.stdout) == without_names(path.read_text())


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_stages_of_the_pre_training_stop_behind_the_switch_they_are_named_for(
    scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA", str(tmp_path))
    suffix = "" if scale == "full" else "_tiny"
    settings = load_settings(
        [f"experiment=kanana_2_155b_a17b{suffix}", "device=cpu"],
        Environment(world_size=256 if scale == "full" else 2, local_world_size=2),
        str(EXAMPLE / "tiny"),
        with_files=False,
    )
    stage_1, batch, mixture, end = (int(step) for step in shell_values(scale, *STAGES))
    (batch_change,) = settings.schedule.batch_size_changes
    (blend_change,) = settings.data.blend_changes

    def tokens(steps: int) -> int:
        return samples_of_steps(settings, steps) * settings.data.sequence_length

    assert tokens(stage_1) < batch_change.tokens < tokens(batch)
    assert tokens(batch) < blend_change.tokens < tokens(mixture) < tokens(end)
    decays = settings.schedule.steps - settings.schedule.decay_steps
    assert tokens(decays) == pytest.approx(blend_change.tokens, rel=1e-4)
    assert end == settings.schedule.steps
    if scale == "full":
        assert tokens(end) == pytest.approx(10e12, rel=1e-4)
        kept = settings.checkpoint.keep_every
        assert all(step % kept == 0 for step in (stage_1, batch, mixture))


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS[1:]])
def test_a_script_names_the_one_whose_result_it_needs(script: str, tmp_path: Path) -> None:
    finished = bash(script, SCALE="tiny", WORK=str(tmp_path))
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    named = re.search(r"run (\d\d)_\w+\.sbatch", line)
    assert named is not None and int(named[1]) < int(script[:2]), line
    assert (EXAMPLE / named[0][4:]).is_file()


def test_a_script_of_the_real_run_is_not_started_by_hand() -> None:
    finished = bash("06_stage_1.sbatch")
    assert finished.returncode == 2
    assert "sbatch 06_stage_1.sbatch" in finished.stderr


@pytest.mark.parametrize("option", ["--in-job", "--without-files"])
def test_options_of_submit_that_the_scripts_use_need_their_place(option: str) -> None:
    finished = run_python("tools/submit.py", option)
    assert finished.returncode == 2
    assert f"{option} " in finished.stderr.splitlines()[-1]


class TinyRun:
    """Everything that the scripts have left at tiny scale."""

    def __init__(self, work: Path, finished: Finished) -> None:
        self.work, self.finished = work, finished
        self.runs = work / "runs"

    def records(self, run: str) -> list[dict[str, Any]]:
        """What a run has measured."""
        lines = (self.runs / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def steps(self, run: str) -> list[dict[str, Any]]:
        """Its training steps."""
        return [record for record in self.records(run) if "loss" in record]

    def evaluations(self, run: str) -> list[dict[str, Any]]:
        """Its evaluations."""
        return [record for record in self.records(run) if "evaluation_loss" in record]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """All scripts in order, from the tokenizer to the exported model."""
    work = tmp_path_factory.mktemp("tiny")
    finished = bash("run_all.sh", SCALE="tiny", WORK=str(work))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return TinyRun(work, finished)


@pytest.mark.timeout(3 * SECONDS)
def test_the_learning_rate_of_the_sweep_is_the_one_of_the_pre_training(tiny: TinyRun) -> None:
    law = json.loads((tiny.runs / "learning_rate_law_64.json").read_text())
    assert len(law["optima"]) >= 3
    rates = [record["learning_rate"] for record in tiny.steps("kanana_2_155b_a17b")]
    assert max(rates) == pytest.approx(law["budget"]["learning_rate"])
    assert rates[-1] == pytest.approx(max(rates) / 10)


def test_the_pre_training_learns_and_goes_over_both_switches_in_one_run(tiny: TinyRun) -> None:
    steps = tiny.steps("kanana_2_155b_a17b")
    assert [record["step"] for record in steps] == list(range(1, 81))
    losses = [record["loss"] for record in steps]
    assert losses[0] == pytest.approx(math.log(1536), rel=0.05)
    assert sum(losses[-10:]) / 10 < 0.65 * losses[0]
    trained = [0, *(record["tokens"] for record in steps)]
    sizes = [after - before for before, after in itertools.pairwise(trained)]
    assert sizes == [1024] * 20 + [2048] * 60

    def share(source: str, first: int, last: int) -> float:
        begin, end = steps[first]["source_tokens"], steps[last]["source_tokens"]
        return float((end[source] - begin[source]) / (trained[last + 1] - trained[first + 1]))

    assert share("english", 0, 49) == pytest.approx(0.45, abs=0.02)
    assert share("english", 49, 79) == pytest.approx(0.225, abs=0.02)
    assert share("math_stem", 49, 79) == pytest.approx(0.275, abs=0.02)


def test_mid_training_learns_to_reason_and_the_context_grows_by_yarn(tiny: TinyRun) -> None:
    evaluations = tiny.evaluations("kanana_2_155b_midtraining")
    assert evaluations[-1]["evaluation_loss"] < 0.85 * evaluations[0]["evaluation_loss"] < 1.0
    (checkpoint,) = (tiny.runs / "kanana_2_155b_long_context" / "checkpoints").iterdir()
    settings = read_settings(checkpoint)
    assert (settings["model"]["yarn_factor"], settings["data"]["sequence_length"]) == (4.0, 1024)
    steps = tiny.steps("kanana_2_155b_long_context")
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_the_exported_model_answers_in_transformers_as_ours_does(tiny: TinyRun) -> None:
    call = '{"name": "set_light", "arguments": {"room": "kitchen", "color": "purple"}}'
    answers = [line for line in tiny.finished.stdout.splitlines() if "<tool_call>{" in line]
    assert answers == [f"<tool_call>{call}</tool_call>"] * 2
    assert "the same, bit by bit" in tiny.finished.stdout


def test_a_held_out_request_is_answered_with_the_right_call_nearly_always(tiny: TinyRun) -> None:
    """By transformers, on pairs of values that no conversation of the training has."""
    evaluations = [each["evaluation_loss"] for each in tiny.evaluations("kanana_2_155b_sft")]
    assert evaluations[-1] < evaluations[0]
    chat = tiny.work / "data" / "chat"
    held_out = [json.loads(line) for line in (chat / "held_out.jsonl").read_text().splitlines()]
    assert len(held_out) >= 40
    learnt = {call_of(json.loads(line)) for line in (chat / "train.jsonl").read_text().splitlines()}
    assert not learnt & set(map(call_of, held_out))
    given = answers(tiny.runs / "kanana_2_155b_a17b_instruct", held_out)
    wrong = [
        (record["messages"], answer)
        for record, (answer, ended) in zip(held_out, given, strict=True)
        if not ended or answer != f"<tool_call>{call_of(record)}</tool_call>"
    ]
    assert len(wrong) <= 0.05 * len(held_out), wrong


def call_of(record: dict[str, Any]) -> str:
    """The call that a conversation's assistant makes, as the chat template writes it."""
    call = record["messages"][1]["tool_calls"][0]["function"]
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return f'{{"name": "{call["name"]}", "arguments": {arguments}}}'


def answers(folder: Path, records: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What transformers' model of a folder replies to each first message, and whether it ended."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    prompts = [
        tokenizer.apply_chat_template(
            record["messages"][:1],
            tools=record["tools"],
            add_generation_prompt=True,
            tokenize=False,
        )
        for record in records
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.eval().generate(**batch, max_new_tokens=64, do_sample=False)
    replies = out[:, batch["input_ids"].shape[1] :].tolist()
    return [
        (tokenizer.decode(reply, skip_special_tokens=True), tokenizer.eos_token_id in reply)
        for reply in replies
    ]


def test_a_finished_stage_says_so_when_it_is_run_again(tiny: TinyRun) -> None:
    for script in ("01_tokenizer", "04_proxy_sweep", "06_stage_1", "09_stage_2_decay", "12_sft"):
        finished = bash(f"{script}.sbatch", SCALE="tiny", WORK=str(tiny.work))
        assert finished.returncode == 0, finished.stderr
        assert f"{script}: done: " in finished.stdout

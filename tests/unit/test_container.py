"""Image and cluster environment: well-formed, one list of steps, and those without a GPU executed.

The full installation takes minutes and downloads gigabytes: SET_UP_IN_FULL=1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.launch import ROOT

SCRIPT = "tools/set_up_cluster.sh"
BIN = Path(sys.executable).parent
IN_FULL = pytest.mark.skipif(
    "SET_UP_IN_FULL" not in os.environ, reason="takes minutes; set SET_UP_IN_FULL=1"
)


def run(*command: str | Path, folder: Path = ROOT, **variables: str) -> str:
    """What a command that must succeed prints."""
    finished = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def steps() -> list[str]:
    """The script's list."""
    match = re.search(r"^STEPS=\((.*)\)$", (ROOT / SCRIPT).read_text(), re.MULTILINE)
    assert match is not None
    return match.group(1).split()


def built_from(folder: Path) -> Path:
    """A copy of what .dockerignore lets into the image."""
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (rule[1:] for rule in rules if rule.startswith("!")):
        source, target = ROOT / name, folder / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copyfile(source, target)
    (folder / SCRIPT).chmod(0o755)
    return folder


def test_dockerfile_and_script_are_well_formed() -> None:
    run(BIN / "hadolint", "Dockerfile")
    run(BIN / "shellcheck", SCRIPT)


def test_the_image_takes_every_step_of_the_script_in_its_order() -> None:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    taken = [
        word
        for line in lines
        if line.startswith("RUN") and SCRIPT in line
        for word in re.sub(r".*set_up_cluster.sh|&&.*|;.*|--to \S+", "", line).split()
    ]
    assert taken == steps()


def test_every_step_and_its_versions_are_known() -> None:
    """Each step prints what it would run, and each named package has its version."""
    pinned = {
        line.split("==")[0].strip().lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for step in steps():
        printed = run(ROOT / SCRIPT, "--to", "/nowhere", "--print", step)
        assert printed.startswith("+ "), step
        for line in printed.splitlines():
            _, is_install, packages = line.partition("constraints.txt' ")
            names = [word for word in re.findall(r"'([^']+)'", packages) if word[0].isalpha()]
            for name in (
                re.split(r"[\[<>=]", name)[0] for name in names if is_install and "/" not in name
            ):
                assert name in pinned, (step, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "/nowhere", "tensorflow"], "is no step: system environment torch"),
        (["--into", "/nowhere"], "is no option"),
        (["torch"], "say where"),
    ],
)
def test_a_wrong_call_is_answered(words: list[str], message: str) -> None:
    finished = subprocess.run([ROOT / SCRIPT, *words], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_the_distribution_has_the_packages() -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt-get")
    printed = run(ROOT / SCRIPT, "--print", "system").splitlines()[-1]
    command = re.findall(r"'([^']+)'", printed)
    packages = command[command.index("--no-install-recommends") + 1 :]
    assert {"g++", "python3-venv"} <= set(packages)
    if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        pytest.skip("apt-get's lists are empty; run apt-get update")
    run("apt-get", "--simulate", "install", "--no-install-recommends", *packages)


def test_a_wheel_of_the_package_is_installed_and_passes_the_check(tmp_path: Path) -> None:
    """As in the image, but with this environment's libraries."""
    (tmp_path / "project").mkdir()
    project = built_from(tmp_path / "project")
    environment = tmp_path / "environment"
    run(project / SCRIPT, "--to", environment, "environment")
    python = environment / "bin" / "python"
    run(
        python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"
    )  # Python 3.11 has an old
    purelib = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (purelib / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    sources = {path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*")}
    assert sources == {path.relative_to(project / "csrc") for path in project.glob("csrc/**/*")}
    printed = run(project / SCRIPT, "--to", environment, "project", "check", OMP_NUM_THREADS="1")
    assert "run_name: kanana_2_tiny" in printed
    assert "with CUDA" in printed
    where = "import megatron_kanana, pathlib; print(pathlib.Path(megatron_kanana.__file__).parent)"
    installed = Path(run(python, "-c", where, folder=tmp_path).strip())
    assert installed == purelib / "megatron_kanana"
    ours = project / "megatron_kanana"
    for pattern in ("conf/**/*.yaml", "data/samples/*.txt", "**/*.jinja", "**/*.py"):
        expected = {str(path.relative_to(ours)) for path in ours.glob(pattern)}
        assert expected <= {str(path.relative_to(installed)) for path in installed.glob(pattern)}
    assert (installed / "_native.so").is_file()


@IN_FULL
def test_a_fresh_environment_is_made_and_passes_the_check(tmp_path: Path) -> None:
    """Every step that needs neither root nor nvcc, with the versions of constraints.txt."""
    taken = [step for step in steps() if step not in ("system", "transformer_engine", "apex")]
    printed = run(ROOT / SCRIPT, "--to", tmp_path / "fresh", *taken)
    assert "run_name: kanana_2_tiny" in printed


@IN_FULL
def test_the_versions_of_gpu_nodes_fit_one_another(tmp_path: Path) -> None:
    """As the image's Python 3.12 resolves them; nothing is downloaded but descriptions."""
    names = run(ROOT / SCRIPT, "--to", "/nowhere", "--print", "torch", "dependencies")
    packages = re.findall(
        r"'([A-Za-z][\w-]*)'(?= |$)",
        " ".join(line.partition("constraints.txt' ")[2] for line in names.splitlines()),
    )
    engine = ["transformer-engine", "transformer-engine-cu13", "einops", "onnx", "onnxscript"]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(5, 40)]
    pip = BIN / "pip"  # hydra-core needs a package that has no wheel
    run(pip, "wheel", "--no-deps", "-w", tmp_path, "antlr4-python3-runtime==4.9.3")
    run(
        *(pip, "install", "--dry-run", "--quiet", "--report", tmp_path / "report.json"),
        *("--target", tmp_path / "target", "--find-links", tmp_path, "--only-binary=:all:"),
        *("--python-version=3.12", "--implementation=cp", *platforms),
        *("--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"),
        *("-c", ROOT / "constraints.txt", *packages, *engine),
        PIP_CONFIG_FILE="/dev/null",
    )
    report = json.loads((tmp_path / "report.json").read_text())
    found = {
        each["metadata"]["name"].lower().replace("_", "-"): each["metadata"]["version"]
        for each in report["install"]
    }
    assert found["torch"] == "2.13.0"
    assert found["nvidia-cudnn-cu13"]
    assert found["transformer-engine"]

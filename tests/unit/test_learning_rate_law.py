"""The learning rate of a token budget: planted laws come back, and bad sweeps are called bad."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_kanana.planning.learning_rate_law import (
    Measurement,
    NoOptimumError,
    find_optima,
    fit_law,
    fit_parabola,
    student_t_quantile,
)
from megatron_kanana.planning.sweep_table import choose_tokens
from tools import fit_learning_rate

EXPONENT, INTERCEPT = -0.23, -1.1
COUNTS = np.arange(255e9, 505e9, 10e9)


def best_rate(tokens: float) -> float:
    """The planted law."""
    return math.exp(EXPONENT * math.log(tokens) + INTERCEPT)


def sweep(noise: float, seed: int = 0) -> list[Measurement]:
    """Five runs around the planted optimum, factors of 1.6 apart."""
    random = np.random.default_rng(seed)
    rates = best_rate(400e9) * 1.6 ** np.arange(-2.0, 3.0)
    return [
        Measurement(
            float(rate),
            float(tokens),
            1.9
            + 40 * float(tokens) ** -0.2
            + 0.02 * math.log(rate / best_rate(tokens)) ** 2
            + noise * float(random.normal()),
        )
        for tokens in COUNTS
        for rate in rates
    ]


def write_csv(path: Path, measurements: list[Measurement]) -> Path:
    """The measurements as a table."""
    lines = [f"{m.learning_rate!r},{m.tokens!r},{m.loss!r}" for m in measurements]
    path.write_text("\n".join(["learning_rate,tokens,loss", *lines]) + "\n")
    return path


def test_an_exact_law_comes_back() -> None:
    optima = find_optima(sweep(noise=0.0))
    assert not optima.without
    for tokens, parabola in optima.parabolas.items():
        assert parabola.optimum == pytest.approx(best_rate(tokens), rel=1e-6)
        assert parabola.curvature == pytest.approx(0.02, rel=1e-6)
    law = fit_law({tokens: found.optimum for tokens, found in optima.parabolas.items()})
    assert law.exponent == pytest.approx(EXPONENT, rel=1e-5)
    assert law.intercept == pytest.approx(INTERCEPT, rel=1e-5)
    assert law.learning_rate(10e12) == pytest.approx(best_rate(10e12), rel=1e-5)
    assert law.r_squared == pytest.approx(1.0)


def test_the_tool_recovers_a_planted_law_from_noisy_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_csv(tmp_path / "sweep.csv", sweep(noise=1e-4))
    report, plot = tmp_path / "law.json", tmp_path / "law.png"
    words = ["--tokens", "10e12", "--json", str(report), "--plot", str(plot)]
    assert fit_learning_rate.main([str(table), *words]) == 0
    found = json.loads(report.read_text())
    assert found["law"]["r_squared"] >= 0.99
    assert found["law"]["exponent"] == pytest.approx(EXPONENT, abs=0.02)
    assert found["doubts"] == []
    budget = found["budget"]
    assert budget["low"] < best_rate(10e12) < budget["high"]
    assert budget["learning_rate"] == pytest.approx(best_rate(10e12), rel=0.05)
    assert f"{budget['learning_rate']:.4g}" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_band_holds_the_truth_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        law = fit_law({t: best_rate(t) * math.exp(0.01 * random.normal()) for t in COUNTS[::4]})
        low, high = law.band(10e12, confidence=0.8)
        inside += low < best_rate(10e12) < high
    assert inside / 200 == pytest.approx(0.8, abs=0.09)  # three standard errors


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),  # tables of Student's distribution
    [(0.975, 1, 12.7062), (0.975, 3, 3.18245), (0.95, 10, 1.81246), (0.975, 200, 1.97190)],
)
def test_quantiles_of_student(probability: float, degrees: int, quantile: float) -> None:
    assert student_t_quantile(probability, degrees) == pytest.approx(quantile, rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ({1e-3: 2.0, 2e-3: 1.9}, "with a finite loss: 2"),
        ({1e-3: 2.0, 2e-3: 1.9, 4e-3: math.nan}, "with a finite loss: 2"),
        ({1e-3: 2.0, 2e-3: 1.9, 4e-3: 1.85}, "the largest learning rate, 0.004"),
        ({1e-3: 1.8, 2e-3: 1.9, 4e-3: 1.95}, "try smaller ones"),
        (
            {1e-3: 1.0, 2e-3: 3.0, 4e-3: 3.05, 8e-3: 0.99, 16e-3: 1.0},
            "opens downwards",
        ),
        (
            {1e-3: 5.0, 2e-3: 4.0, 4e-3: 3.0, 8e-3: 2.0, 16e-3: 1.0, 32e-3: 0.1, 64e-3: 0.11},
            "no interior minimum: the parabola's lies at",
        ),
    ],
)
def test_losses_without_a_minimum_say_so(losses: dict[float, float], reason: str) -> None:
    with pytest.raises(NoOptimumError, match=reason):
        fit_parabola(losses)


def test_only_the_nearest_rates_can_be_used() -> None:
    """A run far above the optimum that went wrong moves a parabola through all."""
    losses = {2.0**k: 2.0 + 0.1 * (k - 0.25) ** 2 for k in range(-2, 3)} | {16.0: 9.0}
    assert fit_parabola(losses, nearest=3).optimum == pytest.approx(2.0**0.25, rel=1e-9)
    assert abs(math.log2(fit_parabola(losses).optimum) - 0.25) > 0.3


@pytest.mark.parametrize(
    ("measurements", "words", "message"),
    [
        ([m for m in sweep(0.0) if m.tokens < 270e9], (), "with an optimum: 2"),
        (sweep(noise=0.01), (), "R^2 ="),
        (sweep(noise=0.0), ("--min-r-squared", "1.1"), "is below 1.1"),
        ([Measurement(m.learning_rate, m.tokens, -m.loss) for m in sweep(0.0)], (), "no law"),
    ],
)
def test_the_tool_does_not_hide_a_bad_fit(
    measurements: list[Measurement],
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = write_csv(tmp_path / "sweep.csv", measurements)
    plot = tmp_path / "law.png"
    assert fit_learning_rate.main([str(table), *words, "--plot", str(plot)]) == 1
    assert message in capsys.readouterr().err
    assert plot.is_file()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "learning_rate,loss\n1,2\n", "a.csv:2: has no tokens; found learning_rate, loss"),
        ("a.csv", "learning_rate,tokens,loss\n1,many,3\n", "tokens = 'many' is not a number"),
        ("a.csv", "learning_rate,tokens,loss\n-1,5,3\n", "must be above 0"),
        ("a.csv", "learning_rate,tokens,loss\n", "there is no measurement"),
        ("a.json", "{", "a.json: is not JSON"),
        ("a.json", '{"losses": []}', "a list under 'runs'"),
        ("a.json", "[3]", "a.json[0]: is not an object"),
        ("a.jsonl", '{"learning_rate": 1}\n', "a.jsonl:1: has no tokens"),
        ("a.txt", "", "is not a run folder or one of .csv, .json, .jsonl"),
        ("run/notes", "", "has no metrics.jsonl"),
        ("run/metrics.jsonl", '{"step": 1, "learning_rate": 1.0}', "has no held-out losses"),
    ],
)
def test_what_cannot_be_read_is_told(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    path = file.parent if file.parent != tmp_path else file
    assert fit_learning_rate.main([str(path)]) == 2
    assert message in capsys.readouterr().err
    assert fit_learning_rate.main([str(tmp_path / "missing")]) == 2


def test_tables_in_json_are_read_alike_and_empty_losses_are_diverged_runs(tmp_path: Path) -> None:
    measurements = sweep(0.0)
    rows = [vars(m) for m in measurements]
    diverged = {"learning_rate": 1.0, "tokens": float(COUNTS[0]), "loss": None}
    (tmp_path / "a.json").write_text(json.dumps({"runs": [*rows, diverged]}))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, diverged]))
    reports = []
    for name in ("a.json", "a.jsonl"):
        report = tmp_path / f"{name}.report"
        assert fit_learning_rate.main([str(tmp_path / name), "--json", str(report)]) == 0
        reports.append(json.loads(report.read_text()))
    assert reports[0] == reports[1]
    assert reports[0]["law"]["exponent"] == pytest.approx(EXPONENT, rel=1e-5)


def test_run_folders_give_the_losses_of_their_stable_phase(tmp_path: Path) -> None:
    for peak in (1e-3, 2e-3, 4e-3):
        folder = tmp_path / f"{peak}"
        folder.mkdir()
        records = []
        for step in range(1, 11):
            rate = peak * (step / 2 if step < 2 else 1.0 if step <= 8 else 0.5)
            records.append({"step": step, "tokens": 100 * step, "learning_rate": rate, "loss": 9.0})
            if step % 2 == 0 or step == 1:
                loss = 2 + math.log(peak / 2.2e-3) ** 2
                average = {"evaluation_loss": 0.0, "averaged_evaluation_loss": loss}
                records.append({"step": step, "tokens": 100 * step, **average})
        lines = [json.dumps(record) for record in records]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    report = tmp_path / "report.json"
    folders = [str(folder) for folder in tmp_path.iterdir() if folder.is_dir()]
    fit_learning_rate.main([*folders, "--json", str(report)])
    optima = json.loads(report.read_text())["optima"]
    assert [found["tokens"] for found in optima] == [200, 400, 600, 800]
    assert all(found["optimum"] == pytest.approx(2.2e-3) for found in optima)


def test_token_counts_are_chosen_by_range_and_spacing() -> None:
    measurements = [Measurement(1e-3, tokens, 2.0) for tokens in (1, 4, 9, 11, 14, 19, 22, 31)]
    chosen = choose_tokens(measurements, first=4, last=25, every=10)
    assert [m.tokens for m in chosen] == [9, 19] or [m.tokens for m in chosen] == [11, 19]

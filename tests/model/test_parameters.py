"""Parameter counts: what is published, and what a built model has."""

from __future__ import annotations

import pytest

from megatron_kanana.planning import count_parameters
from tests.launch import run_python
from tests.model.shipped import shipped_model

# total and active; the proxies' published sizes are rounded, and their convention is not known
PUBLISHED = {
    "kanana_2_30b_a3b": (30.671e9, 3.614e9, 2e-5),
    "kanana_2_155b_a17b": (156.78e9, 16.31e9, 5e-4),
    "kanana_2_155b_a17b_q_lora_1536": (155.22e9, 14.75e9, 5e-4),
    "kanana_2_155b_proxy_1024": (10.8e9, 3.3e9, 7e-2),
    "kanana_2_155b_proxy_1536": (23e9, 4.9e9, 1e-2),
    "kanana_2_155b_proxy_2048": (40.2e9, 6.9e9, 1e-2),
    "kanana_2_155b_proxy_4096": (156.78e9, 16.31e9, 5e-4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_published(name: str) -> None:
    total, active, tolerance = PUBLISHED[name]
    count = count_parameters(shipped_model(name))
    assert count.total == pytest.approx(total, rel=tolerance)
    assert count.active == pytest.approx(active, rel=max(tolerance, 2e-4))


@pytest.mark.parametrize(
    "name",
    [
        "kanana_2_tiny",
        "kanana_2_30b_a3b",
        "kanana_2_155b_a17b",
        "kanana_2_155b_a17b_q_lora_1536",
        "kanana_2_155b_proxy_1024",
    ],
)
def test_counts_are_those_of_the_built_model(name: str) -> None:
    finished = run_python("tests/model/count_on_meta.py", name)
    assert finished.returncode == 0, finished.stderr
    total, routed = map(int, finished.stdout.split()[-2:])
    count = count_parameters(shipped_model(name))
    assert (count.total, count.routed_experts) == (total, routed)

"""The decoding benchmark runs, and says that tokens are equal."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench" / "generate.py"


@pytest.fixture(scope="module")
def bench():
    import sys

    spec = importlib.util.spec_from_file_location("bench_generate", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_no_data_is_a_clear_error(bench, tmp_path, capsys):
    assert bench.main(["kobart", "--data", str(tmp_path / "none")]) == 2
    assert "--data" in capsys.readouterr().err


def test_ratios_are_medians_over_rounds(bench):
    assert bench.ratios({"ours": [1.0, 2.0, 1.0], "generate": [4.0, 6.0, 9.0]}) == {"generate": 4.0}


@pytest.mark.parametrize(
    "case",
    [
        "kobart",
        pytest.param(
            "qwen3",
            marks=pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="minutes of decoding; set FULL_TESTS=1"),
        ),
    ],
)
def test_a_small_run(case, bench, shared_data, tmp_path):
    output = tmp_path / "result.json"
    options = ["--examples", "2", "--new-tokens", "6", "--rounds", "1", "--only", "generate", "ours"]
    assert bench.main([case, *options, "--data", str(shared_data), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["tokens"] == {"examples": 2, "equal": 2, "tie_gaps": {}}
    assert result["times_ours"]["generate"] > 0
    assert {"torch", "transformers", "python"} <= set(result["versions"])

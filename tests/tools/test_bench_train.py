"""The training benches run, on toys: what several ranks send, and what the data of a run cost before its first update."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def bench(root, script, *arguments):
    command = [sys.executable, str(root / "tools" / "bench" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


@pytest.fixture
def made_up(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tools" / "bench"))
    import made_up

    return made_up.write(tmp_path, 100)


WITHOUT_LAUNCHES = """
import sys
sys.path.insert(0, {bench!r})
import ranks, train
FIGURES = {{"all_reduce_bytes": 1e6, "all_reduce_calls": 2.0, "real_tokens_per_second": 1.0}}
train.measured = lambda options, name, model: FIGURES
sys.exit(ranks.main())
"""


def test_the_bench_of_ranks_but_for_its_launches(root, made_up, tmp_path):
    data, tokenizer = made_up
    output = tmp_path / "ranks.json"
    words = ["--data", data, "--tokenizer", tokenizer, "--tiny", "--rounds", "1", "--output", output]
    code = WITHOUT_LAUNCHES.format(bench=str(root / "tools" / "bench"))
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["parameters"] > 0 and found["ratios"]["ours x 2 / ours x 1"] == 1.0
    assert set(found["estimate"]["gpus"]["ours"]) == {"KoBART", "Llama-3.2-3B"}


@pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="two launches of two ranks; set FULL_TESTS=1")
def test_ranks_send_a_gradient_or_their_parts(root, made_up, tmp_path):
    data, tokenizer = made_up
    output = tmp_path / "ranks.json"
    arguments = ["--data", data, "--tokenizer", tokenizer, "--tiny", "--updates", "2", "--rounds", "0"]
    bench(root, "ranks.py", *arguments, "--output", output)
    found = json.loads(output.read_text(encoding="utf-8"))
    volumes = found["collectives_of_an_update"]
    assert volumes["ours"]["all_reduce_bytes"] == pytest.approx(4 * found["parameters"], rel=0.02)  # and a buffer
    assert volumes["ours, fsdp"]["all_gather_bytes"] > 0 and found["estimate"]["measured"] is False


def test_a_second_start_reads_what_the_first_has_kept(root, made_up, tmp_path):
    data, tokenizer = made_up
    output = tmp_path / "start.json"
    arguments = ["--data", data, "--tokenizer", tokenizer, "--rows", "1000", "--rounds", "1", "--output", output]
    bench(root, "start.py", *arguments)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["rows"] == 1000 and 0 < found["second"]["cpu"] < found["first"]["cpu"]

"""The training benches run, on toys: what several ranks send, and what the data of a run cost before its first update."""

from __future__ import annotations

import json
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

"""Zero-shot screening: one process per model, failures with reasons and without scores, resumable."""

from __future__ import annotations

import contextlib
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screen")
    data = tiny.write_rows(folder / "dev.jsonl", 4)
    common = (
        f"data: {{validation_file: {data}, max_source_length: 160, max_target_length: 48}}\n"
        "generation: {num_beams: 1, max_new_tokens: 5}\ntracking: {progress: false, report_to: []}\n"
    )
    for family in ("llama", "bart"):
        tiny.save(family, folder / family)
        (folder / f"{family}.yaml").write_text(
            f"model: {{name_or_path: {folder / family}}}\n{common}", encoding="utf-8"
        )
    changed = common.replace("tracking", "quantization: {load_in_4bit: true}\nprompt: {style: chat}\ntracking")
    wide = tiny.save("llama", folder / "wide", hidden_size=64, intermediate_size=160, head_dim=16)
    (folder / "four_bit.yaml").write_text(f"model: {{name_or_path: {wide}}}\n{changed}", encoding="utf-8")
    (folder / "absent.yaml").write_text(f"model: {{name_or_path: {folder / 'no_such'}}}\n{common}", encoding="utf-8")
    (folder / "broken.yaml").write_text("modell: {}\n", encoding="utf-8")
    return folder


def run(root, place, *arguments):
    command = [sys.executable, str(root / "tools" / "screen.py"), "--output", str(place / "out"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_models_are_scored_and_failures_never_are(root, place):
    recipes = [place / f"{name}.yaml" for name in ("llama", "absent", "four_bit", "broken")]
    done = run(root, place, *recipes)
    assert done.returncode == 4, done.stdout + done.stderr
    with (place / "out" / "screen.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["llama", "absent", "four_bit", "broken"]
    for name in ("llama", "four_bit"):
        assert rows[name]["status"] == "ok" and rows[name]["rows"] == "4"
        assert 0 <= float(rows[name]["rouge_sum"]) <= 300 and float(rows[name]["loss"]) > 0
        with (place / "out" / f"{name}.predictions.csv").open(encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == 4
    for name, code in (("absent", "E4.1"), ("broken", "E2.")):
        assert rows[name]["status"] == "failed" and rows[name]["reason"].startswith(f"error {code}")
        assert rows[name]["rouge_sum"] == rows[name]["rouge1"] == ""
    assert "Traceback" not in done.stdout + done.stderr
    assert "absent" in done.stdout and "failed: error E4.1" in done.stdout

    # A second call runs only what failed, and what is new; a changed file or setting runs again.
    written = {name: (place / "out" / f"{name}.json").stat().st_mtime_ns for name in ("llama", "four_bit")}
    again = run(root, place, *recipes[:2])
    assert "llama ..." not in again.stdout and "absent ..." in again.stdout
    assert (place / "out" / "llama.json").stat().st_mtime_ns == written["llama"]
    assert "llama ..." in run(root, place, recipes[0], "generation.max_new_tokens=4").stdout


@pytest.fixture
def tool(root):
    import importlib.util

    spec = importlib.util.spec_from_file_location("screen", root / "tools" / "screen.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_killed_and_slow_models_are_told_apart(tool, tmp_path):
    log = tmp_path / "x.log"
    log.write_text("loading\n", encoding="utf-8")
    assert tool.reason(-9, log, None) == "killed by SIGKILL (out of memory?)"
    assert tool.reason(-11, log, None) == "killed by SIGSEGV"
    assert tool.reason(None, log, 5) == "not done after 5 s"
    assert tool.reason(3, log, None) == "exit code 3: loading"
    log.write_text("noise\nerror E8.1: out of memory: x | y\nmore noise\n", encoding="utf-8")
    assert tool.reason(8, log, None) == "error E8.1: out of memory: x | y"


def test_a_model_that_takes_too_long_is_ended_with_its_children(tool, place, monkeypatch):
    row = tool.run_child(str(place / "bart.yaml"), "bart", [], place, timeout=0.2)
    assert row["status"] == "failed" and row["reason"] == "not done after 0.2 s"
    assert "rouge_sum" not in row


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_screening_takes_its_models_process_along(root, place, tmp_path, number):
    """Nobody would end it, and it would hold the device."""
    command = [sys.executable, str(root / "tools" / "screen.py"), str(place / "bart.yaml")]
    parent = subprocess.Popen([*command, "data.max_validation_samples=4", "--output", str(tmp_path)])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not (found := children.read_text().split()):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(number)
    parent.wait()
    model = Path(f"/proc/{found[0]}/stat")
    limit = time.monotonic() + 100
    with contextlib.suppress(FileNotFoundError):
        while model.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < limit
            time.sleep(0.02)
    assert not (tmp_path / "bart.metrics.json").exists(), "the model was screened to the end for nobody"


def test_a_table_of_models_that_wrote_nothing(tool):
    """`evaluation.generate: false`: losses, no ROUGE; they stand behind those that have some."""
    quiet = {"recipe": "quiet", "model": "m", "status": "ok", "loss": 2.5, "samples_per_second": 3.0}
    quiet = dict.fromkeys(tool.COLUMNS) | quiet
    scored = quiet | {"recipe": "scored", "rouge_tokenizer": "char", "capped_rate": 0.5, "peak_memory_gib": 1.0}
    scored |= dict.fromkeys(("rouge1", "rouge2", "rougeL"), 20.0) | {"rouge_sum": 0.0}
    lines = tool.table([quiet, scored]).splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", "scored", "quiet", "ROUGE"]
    assert lines[2].split() == ["quiet", "3.00", "2.500", "m"] and len(tool.table([quiet]).splitlines()) == 2


def test_a_damaged_record_is_run_again(tool, place):
    record = place / "damaged.json"
    for text in ("", "[]", "{}", json.dumps({"fingerprint": 1, "row": None})):
        record.write_text(text, encoding="utf-8")
        assert tool.finished(record, str(place / "bart.yaml"), []) is None


def test_arguments(tool, place, capsys):
    assert tool.main(["--output", str(place / "o"), str(place / "bart.yaml"), str(place / "x" / "bart.yaml")]) == 2
    assert "same file name" in capsys.readouterr().err
    behind = [str(place / "bart.yaml"), "--output", str(place / "o"), "--timeout", "0.1", "data.max_source_length=99"]
    assert tool.main(behind) == 4 and "not done after 0.1 s" in capsys.readouterr().out

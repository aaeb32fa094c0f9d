"""Readers that leave, closed streams, other locales, no home: the work is done, or one line says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import runs

pytestmark = pytest.mark.slow

SECRET = "hf_" + "a1B2c3D4e5F6g7H8"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(command, *, cwd, **environment):
    """A line of bash; the exit codes of its pipeline are its last line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        ["bash", "-c", command + '\necho "codes ${PIPESTATUS[@]}" >&2'],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False, encoding="utf-8", errors="replace",
    )  # fmt: skip


@pytest.fixture
def train_line(tmp_path, root):
    recipe = runs.write_recipe(tmp_path, rows=8)
    return f"{sys.executable} {root / 'engine' / 'train.py'} {recipe}"


def predict_line(root, run, *arguments):
    return f"{sys.executable} {root / 'engine' / 'predict.py'} {run} runtime.num_threads=1 " + " ".join(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_reader_that_leaves_ends_no_training(tmp_path, train_line, reader):
    done = shell(f"{train_line} 2>&1 | {reader}", cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "codes 0 0", done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["code"] == 0


@pytest.mark.slow
def test_predict_under_hostile_streams_and_locales(tmp_path, root, train_line):
    assert shell(train_line, cwd=tmp_path).stderr.splitlines()[-1] == "codes 0"
    run, out = tmp_path / "run", tmp_path / "출력" / "요약.csv"
    done = shell(predict_line(root, run, f"--input dev.jsonl --output {out}") + " | true", cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "codes 0 0" and len(out.read_text(encoding="utf-8").splitlines()) == 7
    out.unlink()
    line = predict_line(root, run, f"--input - --output {out}")
    done = shell(f"echo '#Person1#: 안녕하세요' | {line}", cwd=tmp_path, **ASCII)
    assert done.stderr.splitlines()[-1] == "codes 0 0" and out.is_file(), done.stderr[-2000:]
    done = shell(
        predict_line(root, run, f"--input dev.jsonl --output {out}"), cwd=tmp_path, **ASCII, PYTHONIOENCODING="ascii"
    )
    assert done.stderr.splitlines()[-1] == "codes 0" and "Traceback" not in done.stderr
    done = shell(f"{line} <&-", cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "codes 3" and "error E3.32" in done.stderr and "Traceback" not in done.stderr


def test_scoring_without_a_home(root):
    """As in a container under a number that no user has: nltk, which korouge-score imports, gives up without a home."""
    code = (
        "import os, pwd\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\nos.environ.pop('HOME', None)\n"
        "from engine.scoring import rouge\n"
        "print(rouge.rouge(['안녕'], ['안녕'])['rouge1'], os.environ.get('HOME'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == "100.0 None", done.stderr[-1000:]


def test_what_evaluation_lacks_is_known_before_the_first_update(tmp_path, monkeypatch):
    from engine.errors import EngineError
    from engine.scoring import rouge

    monkeypatch.setattr(rouge, "_mecab", lambda: (_ for _ in ()).throw(RuntimeError("no dictionary")))
    rouge.tokenize.cache_clear()
    with pytest.raises(EngineError, match=r"E3\.40: ROUGE cannot be computed here: no dictionary"):
        runs.train(runs.write_recipe(tmp_path, evaluation__rouge_tokenizer="mecab"))
    assert (
        "train" not in (tmp_path / "run" / "metrics.jsonl").read_text()
        if (tmp_path / "run" / "metrics.jsonl").exists()
        else True
    )


@pytest.mark.parametrize("place", ["missing", "full"])
def test_a_temporary_folder_that_cannot_be_used(tmp_path, monkeypatch, place):
    import tempfile

    from engine.errors import EngineError

    def refuse(*arguments, **settings):
        raise (
            FileNotFoundError(2, "No usable temporary directory found")
            if place == "missing"
            else OSError(28, "No space left on device")
        )

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(EngineError, match=r"E6\.1: writing a temporary file failed.*TMPDIR"):
        runs.train(runs.write_recipe(tmp_path))


def test_secrets_reach_no_file_of_a_run(tmp_path):
    """Recipe, log, trackers, checkpoints, model folders: one redaction before anything is told or written."""
    recipe = runs.write_recipe(
        tmp_path,
        experiment__notes=f"see https://me:{SECRET}@example.org?token={SECRET}",
        model__config={"token": SECRET, "dropout": 0.0},
        tracking__report_to=["tensorboard"],
        checkpoint__strategy="steps",
        checkpoint__steps=2,
    )
    runs.train(recipe)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    leaking = [str(path) for path in files if SECRET.encode() in path.read_bytes()]
    assert not leaking


def test_formulas_are_quoted_on_request(tmp_path):
    from engine.prediction.submission import csv_text, write_submission

    table = [["fname", "summary"], ["=1+1", "@SUM(A1)"], ["a", "-2"], ["b", "#Person1#은 간다."]]
    write_submission(table, tmp_path / "exact.csv")
    (tmp_path / "quoted.csv").write_text(csv_text(table, escape_formulas=True), encoding="utf-8")
    assert (tmp_path / "exact.csv").read_text().splitlines()[1:] == ["=1+1,@SUM(A1)", "a,-2", "b,#Person1#은 간다."]
    assert (tmp_path / "quoted.csv").read_text().splitlines()[1:] == ["'=1+1,'@SUM(A1)", "a,'-2", "b,#Person1#은 간다."]


@pytest.mark.parametrize("sample", ["fifo", "/dev/zero"])
def test_a_sample_that_is_no_file(tmp_path, sample):
    from engine.errors import EngineError
    from engine.prediction.submission import submission_table

    if sample == "fifo":
        os.mkfifo(tmp_path / "fifo")
    with pytest.raises(EngineError, match=r"E3\.35.*no regular file"):
        submission_table(["a"], ["x"], tmp_path / sample)

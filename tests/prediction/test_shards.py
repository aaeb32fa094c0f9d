"""Shards of a prediction: every row once, the same file as of a plain run, and refusals that name the shard."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import runs
import tiny
from row_files import as_csv, as_jsonl, as_parquet

from engine import predict
from engine.errors import EngineError
from engine.prediction import shards, summarizer
from engine.prediction.shards import Shard

ROWS = [
    {
        "fname": f"row_{i}",
        "dialogue": "\n".join([*tiny.TEXTS[:1] * (i % 3), f"#Person1#: {i}번입니다."]),
        "summary": "요약",
    }
    for i in range(23)
]
CHEAP = ["generation.min_new_tokens=3", "generation.max_new_tokens=4", "evaluation.per_device_eval_batch_size=2"]


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A folder with dialogues in it, windows of three rows, and the command line up to the output."""
    monkeypatch.setattr(shards, "WINDOW", 3)
    (tmp_path / "rows.jsonl").write_text(as_jsonl(ROWS), encoding="utf-8")
    return Place(tmp_path, [str(trained[0] / "run"), *CHEAP, "--input", str(tmp_path / "rows.jsonl")])


class Place:
    def __init__(self, folder, arguments):
        self.folder, self.arguments, self.output = folder, arguments, folder / "out.csv"

    def run(self, *options, output=None):
        assert predict.main([*self.arguments, "--output", str(output or self.output), *options]) == 0

    def refused(self, *options):
        with pytest.raises(EngineError) as caught:
            self.run(*options)
        assert "\n" not in str(caught.value) and not self.output.exists()
        return str(caught.value)

    def names(self):
        return sorted(path.name for path in self.folder.iterdir() if path.name.startswith((".", "out")))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 22, 23, 24, 25, 100])
@pytest.mark.parametrize("of", [1, 2, 4, 16])
def test_shards_cover_the_rows_once_in_whole_windows(monkeypatch, count, of):
    monkeypatch.setattr(shards, "WINDOW", 3)
    parts = [Shard(number, of).rows(count) for number in range(1, of + 1)]
    assert [row for part in parts for row in part] == list(range(count))
    assert all(part.start % 3 == 0 for part in parts)
    windows = [-(-len(part) // 3) for part in parts]
    assert max(windows) - min(windows) <= 1


def test_shard_names():
    assert Shard.parse("3/16") == Shard(3, 16)
    for wrong in ("0/4", "5/4", "3", "3/", "/4", "a/b", "1/0", "-1/4", "1/10000"):
        with pytest.raises(ValueError):
            Shard.parse(wrong)


@pytest.mark.parametrize(
    "wrong", [["--shard", "4/3"], ["--shard", "1/2", "--merge-shards", "2"], ["--merge-shards", "0"]]
)
def test_wrong_options_are_refused(place, wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        place.run(*wrong)
    assert caught.value.code == 2 and "shard" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict.main([*place.arguments[:-1], "-", "--output", "x.csv", "--shard", "1/2"])
    assert "standard input has no shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [pytest.param("jsonl", marks=pytest.mark.slow), "csv", pytest.param("parquet", marks=pytest.mark.slow)]
)
def test_merged_shards_are_the_file_of_a_plain_run(place, kind, capsys):
    source = place.folder / f"rows.{kind}"
    if kind == "parquet":
        as_parquet(place.folder, ROWS)
    else:
        source.write_text({"jsonl": as_jsonl, "csv": as_csv}[kind](ROWS), encoding="utf-8")
    place.arguments[-1] = str(source)
    place.run(output=place.folder / "plain.csv")
    told, warned = capsys.readouterr()
    assert "empty" not in warned, "the texts are the model's"
    assert "rouge1" in told and "23 summaries" in told
    for number in (3, 1, 4, 2):  # in any order
        place.run("--shard", f"{number}/4")
    assert place.names() == sorted(
        f"out.csv.shard-00{n}-of-004.{end}" for n in range(1, 5) for end in ("json", "jsonl")
    )
    assert capsys.readouterr().out == ""
    place.run("--merge-shards", "4")
    assert place.output.read_bytes() == (place.folder / "plain.csv").read_bytes()
    assert capsys.readouterr().out == told, "scores and endings of all rows"
    assert place.names() == ["out.csv"]


@pytest.mark.slow
def test_more_shards_than_windows_and_a_sample_submission(place):
    sample = place.folder / "sample.csv"
    sample.write_text(",fname,summary\n" + "".join(f"{i},row_{i},x\n" for i in range(23)), encoding="utf-8")
    place.run("--sample-submission", str(sample), output=place.folder / "plain.csv")
    for number in range(1, 12):
        place.run("--shard", f"{number}/11", "--sample-submission", str(sample))
    place.run("--merge-shards", "11", "--sample-submission", str(sample))
    assert place.output.read_bytes() == (place.folder / "plain.csv").read_bytes()
    assert place.output.read_text(encoding="utf-8").startswith(",fname,summary\n0,row_0,")


@pytest.mark.slow
def test_n_best_lists_as_json_lines(place):
    more = ["generation.num_return_sequences=2"]
    plain, merged = place.folder / "plain.jsonl", place.folder / "out.jsonl"
    place.run(*more, output=plain)
    for options in (["--shard", "1/2"], ["--shard", "2/2"], ["--merge-shards", "2"]):
        place.run(*more, *options, output=merged)
    rows = [json.loads(line) for line in merged.read_text(encoding="utf-8").splitlines()]
    assert merged.read_bytes() == plain.read_bytes()
    assert [(row["fname"], row["rank"]) for row in rows] == [(f"row_{i}", rank) for i in range(23) for rank in (1, 2)]


def test_a_killed_shard_goes_on_and_a_finished_one_stays(place, monkeypatch, capsys):
    place.run(output=place.folder / "plain.csv")
    decoded, plain = [], summarizer.Summarizer._decode

    def until(stop):
        def counted(self, model, rows, mask):
            if len(decoded) >= stop:
                raise KeyboardInterrupt  # the middle of a window
            decoded.extend(row.index for row in rows)
            return plain(self, model, rows, mask)

        monkeypatch.setattr(summarizer.Summarizer, "_decode", counted)

    until(8)
    with pytest.raises(KeyboardInterrupt):
        place.run("--shard", "1/2")
    assert len(decoded) == 8 and len([*place.folder.glob("*.partial-rank0.jsonl")]) == 1
    assert "cannot be merged; unfinished: 1; missing: 2" in place.refused("--merge-shards", "2")
    until(1000)
    capsys.readouterr()
    place.run("--shard", "1/2")
    assert "8 of 12 rows were decoded before" in capsys.readouterr().err
    place.run("--shard", "2/2")
    assert sorted(decoded) == list(range(23)), "every row once"
    until(0)
    place.run("--shard", "2/2")
    assert "shard 2 of 2 is finished: 11 rows" in capsys.readouterr().err
    place.run("--merge-shards", "2")
    assert place.output.read_bytes() == (place.folder / "plain.csv").read_bytes()


@pytest.mark.slow
def test_what_does_not_belong_together_is_not_merged(place):
    for number in range(1, 5):
        place.run("--shard", f"{number}/4")
    kept = place.folder / "kept"
    shutil.copytree(place.folder, kept)

    def anew(number, *options):
        for path in place.folder.glob(f"out.csv.shard-00{number}*"):
            path.unlink()
        place.run("--shard", f"{number}/4", *options)

    anew(2, "generation.num_beams=1")
    line = Shard(4, 4).kept(place.output)
    line.write_bytes(line.read_bytes()[:-9])
    Shard(3, 4).record(place.output).unlink()
    found = place.refused("--merge-shards", "4")
    assert "of another model or other settings than most: 2; unfinished: 3; damaged: 4" in found and "E3.36" in found
    assert "the 3 shards cannot be merged; missing: 1, 2, 3" in place.refused("--merge-shards", "3")
    for path in kept.glob("out.csv*"):
        shutil.copy(path, place.folder)
    source = place.folder / "rows.jsonl"
    source.write_text(as_jsonl([*ROWS[:-1], ROWS[-1] | {"dialogue": "다른 말"}]), encoding="utf-8")
    assert "of another input: 1, 2, 3, 4" in place.refused("--merge-shards", "4")
    source.write_text(as_jsonl(ROWS), encoding="utf-8")
    place.run("--merge-shards", "4")
    assert len(place.output.read_text(encoding="utf-8").splitlines()) == 24


def test_a_record_that_lies_about_its_rows_is_not_believed(place):
    """The rows themselves are counted, whatever the record says of the file."""
    for number in (1, 2):
        place.run("--shard", f"{number}/2")
    kept, record = Shard(2, 2).kept(place.output), Shard(2, 2).record(place.output)
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join([lines[0], *lines[2:]]))
    from engine.runtime.atomic import file_record

    record.write_text(json.dumps(json.loads(record.read_text()) | file_record(kept)))
    assert "decoded row 16 of the input cannot be read" in place.refused("--merge-shards", "2")
    assert kept.exists()


def test_two_processes_do_not_decode_the_same_shard(place):
    lock = predict._lock_of(Shard(1, 2).base(place.output))
    lock.acquire()
    try:
        assert "E2.30" in place.refused("--shard", "1/2")
        place.run("--shard", "2/2")
    finally:
        lock.release()


SMALL_WINDOWS = """
import os, signal, sys
from engine import predict
from engine.prediction import shards, summarizer
shards.WINDOW = 3
plain, left = summarizer.Summarizer._decode, [int(os.environ.get("BATCHES_TO_LIVE", "1000"))]

def counted(self, model, rows, mask):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    with open(os.environ["DECODED"], "a") as file:
        file.write("".join(f"{row.index}\\n" for row in rows))
    return plain(self, model, rows, mask)

summarizer.Summarizer._decode = counted
sys.exit(predict.main())
"""


@pytest.mark.slow
def test_a_shard_that_the_kernel_killed_goes_on_and_two_ranks_write_the_same(place, monkeypatch):
    script = place.folder / "small_windows.py"
    script.write_text(SMALL_WINDOWS, encoding="utf-8")
    place.run(output=place.folder / "plain.csv")
    monkeypatch.setenv("DECODED", str(place.folder / "decoded"))

    def decoded():
        return sorted(map(int, (place.folder / "decoded").read_text().split()))

    def launch(*options, **settings):
        return runs.launch(script, *place.arguments, "--output", place.output, *options, **settings)

    monkeypatch.setenv("BATCHES_TO_LIVE", "5")  # two windows of two batches, and the first batch of a third
    assert launch("--shard", "1/2").returncode == -signal.SIGKILL
    assert len(decoded()) == 8
    monkeypatch.delenv("BATCHES_TO_LIVE")
    for options, ranks in (("--shard", "1/2"), 1), (("--shard", "2/2"), 2):
        done = launch(*options, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    assert decoded() == list(range(23)), "every row once"
    place.run("--merge-shards", "2")
    assert place.output.read_bytes() == (place.folder / "plain.csv").read_bytes()
    assert place.names() == ["out.csv"]

"""A prediction that was killed goes on where it stopped."""

from __future__ import annotations

import pytest

from engine import predict
from engine.errors import EngineError
from engine.prediction.partial import PartialResults, SideFile, all_in_order
from engine.prediction.summarizer import Summary


def summary(index):
    return Summary(index, ["요약"], [None], tokens=1, ended=True)


def test_a_prediction_goes_on_where_it_stopped(trained, monkeypatch, capsys):
    """Batches that a side file holds are not decoded again, and the file comes out the same."""
    from engine.prediction import summarizer as prediction_summarizer

    folder, _ = trained
    whole, resumed = folder / "whole.csv", folder / "resumed.csv"
    arguments = [str(folder / "run"), "--input", str(folder / "test.jsonl")]
    batch = "evaluation.per_device_eval_batch_size=2"
    assert predict.main([*arguments, "--output", str(whole), batch]) == 0

    decoded: list[int] = []
    plain = prediction_summarizer.Summarizer._decode

    def counted(self, model, rows, mask):
        if len(decoded) >= 2 and not counted.alive:
            raise KeyboardInterrupt
        decoded.extend(row.index for row in rows)
        return plain(self, model, rows, mask)

    counted.alive = False
    monkeypatch.setattr(prediction_summarizer.Summarizer, "_decode", counted)
    with pytest.raises(KeyboardInterrupt):
        predict.main([*arguments, "--output", str(resumed), batch])
    assert not resumed.exists() and len(decoded) == 2
    side = next(folder.glob("resumed.csv.partial-rank0.jsonl"))
    side.write_text(side.read_text(encoding="utf-8") + 'no JSON\n{"fingerprint": "torn', encoding="utf-8")
    counted.alive = True
    capsys.readouterr()
    assert predict.main([*arguments, "--output", str(resumed), batch]) == 0
    assert "2 of 5 rows were decoded before" in capsys.readouterr().err
    assert sorted(decoded) == list(range(5)), "every row once"
    assert resumed.read_bytes() == whole.read_bytes()


def test_ranks_keep_their_own_files_and_other_predictions_do_not_count(tmp_path):
    output = str(tmp_path / "out[1]*.csv")  # a name that a pattern would read otherwise
    for rank, fingerprint, index in ((0, "this", 0), (1, "this", 1), (0, "other", 2)):
        PartialResults(output, rank, fingerprint=fingerprint).batches.append([summary(index)])
    (tmp_path / "out1x.csv.partial-rank0.jsonl").write_text("not ours")
    kept = PartialResults(output, 0, fingerprint="this")
    assert [record["index"] for record in kept.begun()] == [0, 1]
    kept.finish_window([summary(0), summary(1)])
    assert not kept.begun() and sum(map(len, kept.windows.in_order(range(5)))) == 2
    kept.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["out1x.csv.partial-rank0.jsonl"]


def test_windows_count_up_to_the_first_gap(tmp_path):
    """Lines of another prediction, damaged, torn, out of turn or beyond the end do not; what is decoded again does."""
    file = SideFile(tmp_path / "w.jsonl", "this")
    for fingerprint, first in (("other", 0), ("this", 10), ("this", 12), ("this", 16), ("this", 12)):
        SideFile(file.path, fingerprint).append([summary(first), summary(first + 1)])
    with file.path.open("a") as handle:
        handle.write('no JSON\n{"fingerprint": "this", "rows": [{"in')
    assert [[row.index for row in line] for line in file.in_order(range(10, 16))] == [[10, 11], [12, 13]]
    with pytest.raises(EngineError, match=r"E3\.36: decoded row 15 of the input cannot be read"):
        list(all_in_order(file, range(10, 16)))
    SideFile(file.path, "this").append([summary(14), summary(15)])  # the torn line is gone
    assert [row.index for line in all_in_order(file, range(10, 16)) for row in line] == list(range(10, 16))
    assert list(file.in_order(range(10, 15))) != list(file.in_order(range(10, 16)))


@pytest.mark.parametrize("content", ["chosen", "chosen\ntorn"])
def test_a_link_in_the_side_files_place_is_not_written_through(tmp_path, content):
    (tmp_path / "victim").write_text(content)
    (tmp_path / "out.csv.partial-rank0.jsonl").symlink_to(tmp_path / "victim")
    (tmp_path / "out.csv.partial.jsonl").symlink_to(tmp_path / "victim")
    (tmp_path / "out.csv.partial-rank1.jsonl").symlink_to("/dev/zero")
    partial = PartialResults(str(tmp_path / "out.csv"), 0, fingerprint="f")
    assert partial.begun() == [] and list(partial.windows.lines()) == []
    for file in (partial.batches, partial.windows):
        with pytest.raises(OSError):
            file.append([summary(0)])
    partial.remove()
    assert (tmp_path / "victim").read_text() == content

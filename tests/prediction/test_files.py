"""What prediction reads and writes: refused before anything is decoded, and errors name file, row and id."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from runtime_toys import in_ranks

from engine import predict
from engine.data.stream import ExampleList
from engine.errors import EngineError
from engine.prediction.files import examples_of, open_input, write
from engine.prediction.summarizer import Summary
from engine.recipe.schema import Recipe
from engine.runtime.ranks import RankGroup
from engine.scoring import rouge


@pytest.mark.parametrize(
    ("output", "code"), [("-", 2), ("out.parquet", 2), ("in.csv", 2), (".", 2), ("/dev/null", 2), ("in.csv/out.csv", 6)]
)
def test_outputs_are_refused_before_anything_is_decoded(trained, tmp_path, output, code):
    folder, _ = trained
    source = tmp_path / "in.csv"
    source.write_text('fname,dialogue\na,"#Person1#: 안녕?"\n', encoding="utf-8")
    before = source.read_bytes()
    target = output if output in ("-", "/dev/null") else str(tmp_path / output)
    with pytest.raises(EngineError) as caught:
        predict.main([str(folder / "run"), "--input", str(source), "--output", target])
    assert caught.value.exit_code == code and "nothing was decoded" in str(caught.value)
    assert source.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_what_scoring_lacks_is_told_before_anything_is_decoded(trained, tmp_path, monkeypatch):
    folder, _ = trained

    def broken(text, tokenizer):
        raise RuntimeError("no dictionary")

    monkeypatch.setattr(rouge, "tokenize", broken)
    monkeypatch.setattr(predict, "decode_rest", None)
    arguments = [str(folder / "run"), "--input", str(folder / "dev.jsonl"), "--output", str(tmp_path / "out.csv")]
    with pytest.raises(EngineError, match=r"E3\.40.*no dictionary"):
        predict.main(arguments)
    assert not list(tmp_path.iterdir())


def test_a_row_that_cannot_be_prompted_is_named_by_file_row_and_id(trained, tmp_path):
    """Two rows fit into eight tokens with their own topics; the third one's topic leaves no room for its dialogue."""
    folder, _ = trained
    source = tmp_path / "in.csv"
    long = "아주 " * 40
    rows = ['a,"#Person1#: 안녕?",일', 'b,"#Person1#: 뭐 해?",일', f'대화-3,"#Person1#: {long}",{long}']
    source.write_text("\n".join(["fname,dialogue,topic", *rows]), encoding="utf-8")
    arguments = [str(folder / "run"), "--input", str(source), "--output", str(tmp_path / "out.csv")]
    with pytest.raises(EngineError) as caught:
        predict.main([*arguments, "data.topic_column=topic", "data.max_source_length=30"])
    assert caught.value.code == "E2.72" and f"{source} row 3 (id 대화-3)" in str(caught.value)


def test_a_line_of_standard_input_that_is_no_text_is_named(monkeypatch):
    monkeypatch.setattr("sys.stdin", ["안녕?\n", "\ud800\n"])
    with pytest.raises(EngineError, match="standard input row 2") as caught:
        list(open_input("-", Recipe(), RankGroup()).examples())
    assert caught.value.code == "E3.31"


def test_lines_of_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", ["가: 안녕?\\n나: 네.\n", "\n", "가: 뭐 해?\n"])
    rows = list(open_input("-", Recipe(), RankGroup()).examples())
    assert [(row.id, row.row, row.dialogue) for row in rows] == [("0", 1, "가: 안녕?\n나: 네."), ("1", 2, "가: 뭐 해?")]
    monkeypatch.setattr("sys.stdin", ["\n"])
    with pytest.raises(EngineError, match=r"E3\.32"):
        list(open_input("-", Recipe(), RankGroup()).examples())


@pytest.mark.parametrize(("lines", "texts"), [(["가: 안녕?\n", "나: 네.\n"], ["가: 안녕?", "나: 네."]), ([], None)])
def test_several_ranks_share_the_one_standard_input(monkeypatch, lines, texts):
    monkeypatch.setattr("sys.stdin", iter(lines))
    found = in_ranks(2, lambda ranks: [row.dialogue for row in open_input("-", Recipe(), ranks).examples()])
    assert found == [texts] * 2 if texts else [error.code for error in found] == ["E3.32"] * 2


def test_ranks_with_unequal_inputs_are_told_before_the_model_is_loaded(tmp_path):
    for rank in range(2):
        (tmp_path / f"{rank}.csv").write_text(f"fname,dialogue\na,안녕 {rank}?\n", encoding="utf-8")

    def task(ranks):
        arguments = ["no-model", "--input", str(tmp_path / f"{ranks.rank}.csv"), "--output", str(tmp_path / "out.csv")]
        runtime = SimpleNamespace(ranks=ranks, is_main=ranks.is_main, hold=lambda lock: None)
        predict.predict(predict.parse(arguments), Recipe(), runtime)

    assert [error.code for error in in_ranks(2, task)] == ["E9.3"] * 2


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("out.csv", 'fname,rank,summary,score\na,1,둘,-0.5\na,2,"하\n나",-1.25\n'),
        (
            "out.jsonl",
            '{"fname": "a", "rank": 1, "summary": "둘", "score": -0.5}\n'
            '{"fname": "a", "rank": 2, "summary": "하\\n나", "score": -1.25}\n',
        ),
    ],
)
def test_n_best_lists_keep_every_hypothesis(tmp_path, capsys, name, written):
    (row,) = examples_of(["#Person1#: 안녕?"])
    row = replace(row, id="a")
    options = SimpleNamespace(output=str(tmp_path / name), sample_submission=None, escape_formulas=False)
    summary = Summary(0, ["둘", "하\n나"], [-0.5, -1.25], tokens=1, ended=True, fired=["fix_cut_word"])
    write(ExampleList([row]), lambda: [[summary]], options, Recipe())
    assert (tmp_path / name).read_text(encoding="utf-8") == written
    assert "post-processing of 1 texts: fix_cut_word 1" in capsys.readouterr().out

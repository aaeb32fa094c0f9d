"""The tools around a trained model: tuning of decoding, averaged checkpoints, ensembles; on tiny models, end to end."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from trials import Decoding

from engine.data.vocabulary import train_tokenizer
from engine.errors import EngineError
from engine.recipe.load import load_recipe
from engine.scoring import endings, intervals

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tune, ensemble, averaging = load("tune_decoding"), load("ensemble"), load("average_checkpoints")

# --- grid, ledger, verdict ---


def test_grid_is_every_combination():
    grid = tune.parse_grid("num_beams=[3, 5] generation.length_penalty=[0.5,1.0]  early_stopping=never")
    assert grid == [
        {"num_beams": b, "length_penalty": p, "early_stopping": "never"} for b in (3, 5) for p in (0.5, 1.0)
    ]
    assert tune.parse_grid("block_scripts=[[latin, kana], []]") == [
        {"block_scripts": ["latin", "kana"]},
        {"block_scripts": []},
    ]
    assert tune.parse_grid("fix_particles=[true, false] length_penalty=1e-1") == [
        {"fix_particles": value, "length_penalty": 0.1} for value in (True, False)
    ]


@pytest.mark.parametrize(
    "text", ["", "num_beams", "num_beams=[3,5", "num_beams=[]", "num_beams=3 num_beams=5", "[3,5] num_beams=2"]
)
def test_bad_grids(text):
    with pytest.raises(EngineError) as error:
        tune.parse_grid(text)
    assert error.value.code == "E2.61"


def test_grid_has_a_limit():
    values = list(range(60))
    with pytest.raises(EngineError, match="3600 settings"):
        tune.parse_grid(f"num_beams={values} top_k={values}")


def test_ledger_survives_a_torn_line(tmp_path):
    decoding = Decoding(["가\u2028나", "다"], [True, False], 7, 1.5)
    ledger = tune.Ledger(tmp_path / "t" / "trials.jsonl", "model")
    ledger.add("one", decoding, {"num_beams": 3})
    with ledger.path.open("a") as handle:
        handle.write('{"key": "two", "decod')
    again = tune.Ledger(ledger.path, "model")
    assert set(again.known) == {"one"} and Decoding(**again.known["one"]) == decoding
    again.add("two", decoding, {})
    assert set(tune.Ledger(ledger.path, "model").known) == {"one", "two"}


def made_trial(changes, scores, base, seconds=1.0):
    rows = [dict.fromkeys(tune.METRICS, s) for s in scores]
    report = endings.ending_report(["네."] * len(scores), ["네."] * len(scores), [False] * len(scores))
    decoding = Decoding(["네."] * len(scores), [True] * len(scores), 3, seconds)
    interval = intervals.bootstrap_interval(scores, 0)
    return tune.Trial(changes, decoding, rows, interval, intervals.paired_difference(scores, base, 0), report)


def test_verdict_takes_the_optimism_of_choosing_off():
    """Forty settings that differ by noise alone: the best looks better, and is not expected to be."""
    generator = torch.Generator().manual_seed(1)
    base = [50.0] * 60
    noise = [[50.0 + 5 * v for v in torch.randn(60, generator=generator).tolist()] for _ in range(40)]
    trials = [made_trial({}, base, base), *(made_trial({"top_k": i}, s, base) for i, s in enumerate(noise))]
    best = tune.ranked(trials)[0]
    assert best.interval.mean > 51
    gain = intervals.selection_gain([[r["rouge_sum"] for r in t.rows] for t in trials], base)
    assert abs(gain) < 0.6 < best.difference.mean
    lines = tune.verdict(trials, "rouge_sum", 0)
    assert "Best of 41" in lines[0] and len(lines) == 3
    # a real gain is kept
    real = [s + 4 for s in noise[0]]
    true = sum(real) / len(real) - 50
    assert intervals.selection_gain([base, real], base) == pytest.approx(true, abs=0.5)


def test_equal_settings_keep_the_runs_own():
    base = [1.0, 2.0, 3.0]
    trials = [made_trial({}, base, base, seconds=9), made_trial({"num_beams": 3}, base, base, seconds=1)]
    assert tune.ranked(trials)[0].changes == {}
    assert "own settings are the best of 2" in tune.verdict(trials, "rouge_sum", 0)[0]


# --- tiny runs ---


def recipe_text(dev: Path, **generation) -> str:
    values = {"num_beams": 2, "max_new_tokens": 6} | generation
    lines = [f"  {key}: {value}" for key, value in values.items()]
    return "\n".join(
        [
            *("model:", "  name_or_path: tiny/model"),
            *("data:", f"  train_file: {dev}", f"  validation_file: {dev}", "generation:", *lines),
            *("evaluation:", "  rouge_tokenizer: char", "  per_device_eval_batch_size: 4"),
            "",
        ]
    )


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run folder with a tiny random model and three checkpoints."""

    def make(name: str = "run", family: str = "bart", seed: int = 0, steps=(10, 20, 30)) -> Path:
        run = tmp_path / name
        dev = tiny.write_rows(tmp_path / "dev.jsonl", 4)
        for step in steps:
            tiny.save(family, run / f"checkpoint-{step}", seed=seed + step)
            (run / f"checkpoint-{step}" / "manifest.json").write_text("{}")
        tiny.save(family, run / "final_model", seed=seed)
        for place in (run, run / "final_model"):
            (place / "recipe.yaml").write_text(recipe_text(dev), encoding="utf-8")
        return run

    return make


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_tuning_end_to_end(make_run, capsys, family, monkeypatch):
    run = make_run(family=family)
    arguments = [str(run), "--grid", "num_beams=[1,2] length_penalty=[0.5,1.0]", "--device", "cpu"]
    assert tune.main(arguments) == 0
    printed = capsys.readouterr().out
    with (run / "tuning" / "tuning.csv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    # num_beams=2 length_penalty=1.0 are the run's own values; without beams the length penalty changes nothing
    assert len(rows) == 3 and [row["own_settings"] for row in rows].count("True") == 1
    assert {row["rouge_tokenizer"] for row in rows} == {"char"}
    sums = [float(row["rouge_sum"]) for row in rows]
    assert sums == sorted(sums, reverse=True)
    assert "95 % interval" in printed and "the run's own settings" in printed

    # the overlay is a base for other recipes, and gives back the best row's values
    derived = run / "derived.yaml"
    derived.write_text("base: [recipe.yaml, tuning/best.yaml]\n", encoding="utf-8")
    generation = load_recipe(derived).generation
    assert generation.num_beams == json.loads(rows[0]["num_beams"])
    assert generation.length_penalty == json.loads(rows[0]["length_penalty"])

    # a second call decodes only what is new
    from trials import Subject

    decoded = []
    whole = Subject.decode
    monkeypatch.setattr(Subject, "decode", lambda self, s, *a: decoded.append(s) or whole(self, s, *a))
    assert tune.main(arguments) == 0 and not decoded
    again = (run / "tuning" / "tuning.csv").read_text(encoding="utf-8")
    assert [row["rouge_sum"] for row in csv.DictReader(again.splitlines())] == [row["rouge_sum"] for row in rows]
    assert tune.main([*arguments[:2], "num_beams=[1,2,3]", *arguments[3:]]) == 0 and len(decoded) == 1


def test_tuning_is_equal_to_decoding_each_setting_alone(make_run):
    from trials import open_subject

    run = make_run()
    tune.main([str(run), "--grid", "num_beams=[3] no_repeat_ngram_size=[2]", "--device", "cpu"])
    lines = (run / "tuning" / "trials.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    subject = open_subject(run, device="cpu")
    for line in map(json.loads, lines):
        section = subject.generation({f"generation.{k}": v for k, v in line["changes"].items()})
        assert subject.decode(subject.summarizer(section)).texts == line["decoding"]["texts"]


@pytest.mark.parametrize(
    ("grid", "code"), [("num_beams=[2,0]", "E2"), ("beams=[2]", "E2"), ("num_return_sequences=[5]", "E2")]
)
def test_settings_are_refused_before_anything_is_decoded(make_run, grid, code):
    run = make_run()
    with pytest.raises(EngineError) as error:
        tune.main([str(run), "--grid", grid, "--device", "cpu"])
    assert error.value.code.startswith(code) and not (run / "tuning").exists()


# --- averaged checkpoints ---


def test_average_of_the_last_checkpoints(make_run, capsys):
    from safetensors.torch import load_file
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    run = make_run()
    (run / "checkpoint-40").mkdir()  # unfinished: no manifest
    assert averaging.main([str(run), "--last", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "gain of combining" in printed and "checkpoint-20" in printed and "checkpoint-30" in printed
    folder = run / "averaged-20-30"
    mean = load_file(folder / "model.safetensors")
    members = [load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (20, 30)]
    for name, tensor in mean.items():
        assert torch.allclose(tensor, (members[0][name] + members[1][name]) / 2, atol=1e-7)
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).config.model_type == "bart"
    assert AutoTokenizer.from_pretrained(folder)("가")["input_ids"]
    assert not (folder / "manifest.json").exists()
    assert json.loads((folder / "averaging.json").read_text())["weights"] == [0.5, 0.5]
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []


def test_weighted_average_of_named_folders(make_run, tmp_path):
    from safetensors.torch import load_file

    run = make_run()
    folders = [run / "checkpoint-10", run / "checkpoint-30"]
    output = tmp_path / "mean"
    arguments = [*map(str, folders), "--weights", "3", "1", "--output", str(output), "--no-score"]
    assert averaging.main(arguments) == 0
    a, b, mean = (load_file(f / "model.safetensors") for f in (*folders, output))
    name = next(iter(mean))
    assert torch.allclose(mean[name], 0.75 * a[name] + 0.25 * b[name], atol=1e-7)
    with pytest.raises(EngineError, match=r"E2\.63"):  # never over an existing folder
        averaging.main(arguments)


def test_average_refuses(make_run, tmp_path):
    run, other = make_run(), tiny.save("t5", tmp_path / "other")
    out = ["--output", str(tmp_path / "out"), "--no-score"]
    for arguments, code in (
        ([str(run), "--last", "9"], "E5.60"),
        ([str(tmp_path / "none"), "--last", "2"], "E5.61"),
        ([str(run / "checkpoint-10")], "E2.62"),
        ([str(run / "checkpoint-10"), str(run / "checkpoint-20"), "--weights", "1"], "E2.62"),
        ([str(run / "checkpoint-10"), str(other)], "E4.60"),
    ):
        with pytest.raises(EngineError) as error:
            averaging.main([*arguments, *out])
        assert error.value.code == code
        assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


# --- ensembles ---


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)
    return str(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_mbr_over_files(tmp_path, capsys):
    right, near, wrong = "회의는 내일 오후 3시에 열린다.", "회의는 내일 3시에 열린다.", "커피, 차를\n마신다."
    one = write_csv(tmp_path / "a.csv", ["fname", "summary"], [["x", wrong], ["y", right]])
    two = write_csv(tmp_path / "b.csv", ["id", "dialogue", "prediction"], [["y", "d", near], ["x", "d", right]])
    three = write_csv(tmp_path / "c.csv", ["", "fname", "summary"], [["0", "x", near], ["1", "y", wrong]])
    references = write_csv(tmp_path / "dev.csv", ["fname", "summary"], [["x", right], ["y", right], ["z", wrong]])
    output = tmp_path / "out" / "mbr.csv"
    assert ensemble.main(["mbr", one, two, three, "--output", str(output), "--references", references]) == 0
    rows = read_csv(output)
    assert [row["fname"] for row in rows] == ["x", "y"] and wrong not in [row["summary"] for row in rows]
    printed = capsys.readouterr().out
    assert "gain of combining" in printed and "python-mecab-ko" in printed and "taken from " in printed
    # all the weight on one file is that file
    assert ensemble.main(["mbr", one, two, "--weights", "1", "0", "--output", str(output)]) == 0
    assert [row["summary"] for row in read_csv(output)] == [wrong, right]


def test_mbr_counts_a_file_once_however_long_its_list(tmp_path):
    a, b = "가나 다라 마바", "사아 자차 카타"
    long = write_csv(tmp_path / "a.csv", ["fname", "summary"], [["x", a]] * 5)
    short = write_csv(tmp_path / "b.csv", ["fname", "summary"], [["x", b]])
    output = tmp_path / "o.csv"
    ensemble.main(["mbr", long, short, "--weights", "1", "1.2", "--output", str(output)])
    assert read_csv(output)[0]["summary"] == b


def test_mbr_reads_json_lines(tmp_path):
    path = tmp_path / "n_best.jsonl"
    rows = [{"fname": 7, "rank": rank, "summary": text} for rank, text in enumerate(["가 나", "가 나", "다"], start=1)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    ensemble.main(["mbr", str(path), str(path), "--output", str(tmp_path / "o.csv")])
    assert read_csv(tmp_path / "o.csv") == [{"fname": "7", "summary": "가 나"}]


def test_mbr_refusals(tmp_path):
    good = write_csv(tmp_path / "a.csv", ["fname", "summary"], [["x", "가"]])
    other = write_csv(tmp_path / "b.csv", ["fname", "summary"], [["y", "가"]])
    columns = write_csv(tmp_path / "c.csv", ["fname", "text"], [["x", "가"]])
    output = ["--output", str(tmp_path / "o.csv")]
    for arguments, code in (
        ([good, other], "E3.53"),
        ([good, columns], "E3.51"),
        ([good, str(tmp_path / "none.csv")], "E3.50"),
        ([good, good, "--weights", "1"], "E2.64"),
        ([good, good, "--references", other], "E3.54"),
    ):
        with pytest.raises(EngineError) as error:
            ensemble.main(["mbr", *arguments, *output])
        assert error.value.code == code
    with pytest.raises(SystemExit):
        ensemble.main(["mbr", good, *output])
    assert not (tmp_path / "o.csv").exists()


def test_mbr_fills_a_sample_submission(tmp_path):
    one = write_csv(tmp_path / "a.csv", ["fname", "summary"], [["x", "가 나"], ["y", "다"]])
    sample = write_csv(tmp_path / "s.csv", ["", "fname", "summary"], [["0", "x", "s"], ["1", "y", "s"]])
    output = tmp_path / "o.csv"
    ensemble.main(["mbr", one, one, "--output", str(output), "--sample-submission", sample])
    assert output.read_text(encoding="utf-8") == ",fname,summary\n0,x,가 나\n1,y,다\n"


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_average_of_probabilities_end_to_end(make_run, tmp_path, capsys, family):
    from trials import open_subject

    runs = [make_run("one", family, seed=1), make_run("two", family, seed=2)]
    output = tmp_path / "together.csv"
    arguments = ["average", *map(str, runs), "--output", str(output), "--device", "cpu"]
    assert ensemble.main([*arguments, "generation.num_beams=3"]) == 0
    assert "gain of combining" in capsys.readouterr().out
    assert [row["fname"] for row in read_csv(output)] == [f"row_{i}" for i in range(4)]

    # the weight all on one member: that member alone
    assert ensemble.main([*arguments, "--weights", "0", "1", "--no-members"]) == 0
    subject = open_subject(runs[1], device="cpu")
    alone = subject.decode(subject.summarizer(subject.generation()))
    assert [row["summary"] for row in read_csv(output)] == alone.texts


def test_average_refuses_another_vocabulary(make_run, tmp_path):
    one, two = make_run("one"), make_run("two")
    smaller = train_tokenizer(tiny.TEXTS[:5], added_tokens=tiny.ADDED, causal=False)
    smaller.save_pretrained(two / "final_model")
    with pytest.raises(EngineError, match="vocabulary is not that of"):
        ensemble.main(["average", str(one), str(two), "--output", str(tmp_path / "o.csv"), "--device", "cpu"])


def test_help_is_quick_and_imports_no_torch():
    import subprocess

    for name in ("tune_decoding", "ensemble", "average_checkpoints"):
        run = f"runpy.run_path('tools/{name}.py', run_name='__main__')"
        code = f"import sys, runpy; sys.argv = ['{name}', '--help']\ntry: {run}\nfinally: print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.endswith("False\n") and "usage" in done.stdout, done.stderr

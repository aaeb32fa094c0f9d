"""Runs side by side: numbers that are the rows' own, refusals in one line, and a page that a browser opens offline."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil

import browser
import compare
import compared
import comparing
import pytest
import yaml
from comparing import Words

from engine.errors import EngineError
from engine.scoring import intervals, rouge

HOSTILE = '</script><script>document.title="broken in"</script><img src="http://example.org/x">'


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Run folders on the same 100 rows: the first writes HOSTILE in one summary, the second is better, the third worse."""
    folder = tmp_path_factory.mktemp("compared")
    rows = compared.quickstart_rows(100)
    rows[3]["dialogue"] += f"\n#Person2#: {HOSTILE}"
    floors = {
        "dev": {name: {"rouge_mean": 9.0, "rouge1": 9.0, "rouge2": 9.0, "rougeL": 9.0} for name in ("lead", "constant")}
    }
    floors["dev"]["lead"] |= {"turns": 2, "rouge_tokenizer": "whitespace"}
    floors["dev"]["constant"] |= {"text": "늘 같은 문장", "rouge_tokenizer": "whitespace"}
    for number, (name, share) in enumerate((("base", 0.4), ("longer", 0.2), ("wide", 0.6))):
        recipe = {"training.num_train_epochs": 3 + number, "generation.num_beams": 8 if name == "wide" else 4}
        write = compared.forgetful(share, number)
        if name == "base":
            write = lambda text, write=write: HOSTILE if text == rows[5]["reference"] else write(text)  # noqa: E731
        results = {"baselines": floors, "kind": "stopped" if name == "wide" else "done"}
        compared.write_run(folder / name, rows, write, recipe=recipe, results=results)
    return [folder / name for name in ("base", "longer", "wide")]


@pytest.fixture(scope="module")
def page(three, tmp_path_factory):
    pytest.importorskip("plotly")
    path = tmp_path_factory.mktemp("page") / "compare.html"
    assert compare.main([*map(str, three), "--html", str(path)]) == 0
    return path


def values(folder) -> list[float]:
    with (folder / "predictions" / "dev-step40.csv").open(encoding="utf-8", newline="") as file:
        return [sum(float(row[key]) for key in rouge.METRICS) / 3 for row in csv.DictReader(file)]


def test_the_table_says_what_differs_and_what_it_was_worth(three, capsys):
    assert compare.main(list(map(str, three))) == 0
    printed = capsys.readouterr().out
    above, below = printed[: printed.index("recipes differ in:")].split("gain over base")
    lines, gains = ({line.split("  ")[0]: line for line in part.splitlines()} for part in (above, below))
    for folder in three[1:]:
        found = intervals.paired_difference(values(folder), values(three[0]))
        assert f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]" in gains[folder.name]
        assert "< 0.001" in gains[folder.name] and found.p < 0.001
    own = intervals.bootstrap_interval(values(three[0]))
    assert f"{own.mean:.2f}  [{own.low:.2f}, {own.high:.2f}]" in lines["base"]
    assert (
        lines["longer"].endswith("best")
        and lines["wide"].endswith("stopped")
        and "9.00" in lines["always: 늘 같은 문장"]
    )
    differing = printed[printed.index("recipes differ in:") :]
    assert re.findall(r"^(\w+\.\w+)", differing, re.MULTILINE) == ["training.num_train_epochs", "generation.num_beams"]
    assert "learning_rate" not in printed and "experiment.name" not in printed


def change(folder, to, **parts) -> str:
    """A copy of a run folder with some of its files replaced; None removes one."""
    shutil.copytree(folder, to)
    for name, text in parts.items():
        path = to / {"recipe": "recipe.yaml", "results": "results.json", "rows": "predictions/dev-step40.csv"}[name]
        path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    return str(to)


HEAD = "id,dialogue,reference,prediction\n"


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("E2.75", {"recipe": None}),
        ("E2.75", {"results": "{"}),
        ("E2.75", {"results": None}),
        ("E2.75", {"results": '{"best_step": "forty"}'}),
        ("E2.76", {"rows": HEAD + "dev_0,대화,요약,요약\n"}),
        ("E3.60", {"rows": None}),
        ("E3.61", {"rows": "id,dialogue\na,b\n"}),
        ("E3.61", {"rows": HEAD + "a,b\n"}),
        ("E3.61", {"rows": HEAD.strip() + ",rouge1,rouge2,rougeL\ndev_0,대화,요약,요약,1,2,drei\n"}),
        ("E3.62", {"rows": HEAD + "dev_0,대화,,요약\n"}),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(three, tmp_path, code, parts):
    first = change(three[0], tmp_path / "first", **parts) if "drei" in str(parts) else str(three[0])
    with pytest.raises(EngineError) as caught:
        compare.main([first, change(three[1], tmp_path / "other", **parts)])
    assert caught.value.code == code and "\n" not in str(caught.value), str(caught.value)


def test_other_rows_are_named_and_a_run_is_not_its_own_rival(three, tmp_path):
    small = compared.write_run(tmp_path / "debug", compared.quickstart_rows(10), str)
    with pytest.raises(EngineError, match=r"different dev rows.*100 rows .*: base, longer; 10 rows .*: debug"):
        compare.main([*map(str, three[:2]), str(small)])
    with pytest.raises(EngineError) as caught:
        compare.main([str(three[0]), f"{three[0]}/../base"])
    assert caught.value.code == "E2.77"
    with pytest.raises(SystemExit):
        compare.main([str(three[0])])


def test_rows_without_scores_or_with_other_tokenizers_are_scored_anew(three, tmp_path):
    """Runs of before the columns, and runs that counted words where the first counts characters."""
    with (three[1] / "predictions" / "dev-step40.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    bare = "".join(compare_csv([row[key] for key in ("id", "dialogue", "reference", "prediction")]) for row in rows)
    old = change(three[1], tmp_path / "old", rows=HEAD + bare)
    first, again = comparing.read_runs([three[0], tmp_path / "old"], "dev")
    assert again.values("rouge_mean") == pytest.approx(values(three[1])) and old
    recipe = yaml.safe_load((three[0] / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["evaluation"]["rouge_tokenizer"] = "char"
    change(three[0], tmp_path / "char", recipe=yaml.safe_dump(recipe, allow_unicode=True))
    runs = comparing.read_runs([tmp_path / "char", three[1]], "dev")
    pairs = [(row["prediction"], row["reference"]) for row in rows]
    assert runs[1].values("rouge1") == [
        row["rouge1"] for row in rouge.rouge_rows([p for p, _ in pairs], [r for _, r in pairs], "char")
    ]
    assert runs[0].name != runs[1].name


def compare_csv(cells: list[str]) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n"


def test_errors_are_grouped_by_what_dialogues_have_in_common(three):
    runs = comparing.read_runs(three, "dev")
    topics = comparing.topics_of(runs[0], "dev")
    assert len(topics) == 100 and topics["dev_0"]
    errors = comparing.errors_of(runs, topics | {row["id"]: "이사" for row in runs[0].rows[:30]})
    assert list(errors) == [
        "Length of the dialogue, characters", "Turns", "Speakers", "Placeholders in the reference", "Topic",
    ]  # fmt: skip
    for buckets in errors.values():
        assert sum(bucket.rows for bucket in buckets) == 100
        for place in range(3):
            total = sum(bucket.rows * bucket.intervals[place].mean for bucket in buckets)
            assert total / 100 == pytest.approx(sum(runs[place].values("rouge_mean")) / 100)
    assert [bucket.label for bucket in errors["Speakers"]] == ["2", "3"]
    lengths = [tuple(map(int, bucket.label.split(" to "))) for bucket in errors["Length of the dialogue, characters"]]
    assert len(lengths) == 4 and all(a[1] < b[0] for a, b in zip(lengths, lengths[1:], strict=False))
    topic = errors["Topic"][0]
    assert (topic.label, topic.rows) == ("이사", 30) and errors["Topic"][-1].label == "others"


def test_placeholders_that_are_lost_and_invented_are_counted(tmp_path):
    rows = [
        {"id": str(i), "dialogue": "#Person1#: 가\n#Person2#: 나", "reference": text}
        for i, text in enumerate(["#Person1#은 간다", "#Person1#은 #Person2#와 간다"])
    ]
    swap = lambda text: text.replace("#Person2#", "#Person3#")  # noqa: E731
    for name, write in (("same", str), ("swapped", swap)):
        compared.write_run(tmp_path / name, rows, write)
    found = comparing.placeholders_of(comparing.read_runs([tmp_path / "same", tmp_path / "swapped"], "dev"))
    assert found == [
        ("#Person1#", 2, [1.0, 1.0], [0, 0]), ("#Person2#", 1, [1.0, 0.0], [0, 0]), ("#Person3#", 0, [0.0, 0.0], [0, 1])
    ]  # fmt: skip


def test_differing_words_are_marked_and_rows_ranked(tmp_path):
    rows = [{"id": f"r{i}", "dialogue": "#Person1#: 네", "reference": "둘은 내일 산에 갑니다."} for i in range(3)]
    texts = iter(["둘은 내일 산에 갑니다.", "둘은 오늘 산에 갑니다.", "물에 갑니다."] + ["둘은 내일 산에 갑니다."] * 3)
    for name in ("one", "two"):
        compared.write_run(tmp_path / name, rows, lambda _: next(texts))
    runs = comparing.read_runs([tmp_path / "one", tmp_path / "two"], "dev")
    same, other, worst = comparing.dialogues_of(runs, {})
    assert other.summaries[0] == [Words("둘은", False), Words("오늘", True), Words("산에 갑니다.", False)]
    assert other.reference == [Words("둘은 내일 산에 갑니다.", False)], (
        "the second run has the word that the first lacks"
    )
    assert same.disagreement == 0 < other.disagreement < worst.disagreement <= 100
    orders = {
        name: [row.id for row in sorted((same, other, worst), key=value, reverse=True)]
        for name, _, value in comparing.sort_keys(runs)
    }
    assert orders["disagreement"] == orders["gain-1"] == orders["worst-0"] == ["r2", "r1", "r0"]
    assert orders["loss-1"] == ["r0", "r1", "r2"]


def test_curves_are_thinned_and_hold_no_gaps(tmp_path):
    rows = compared.quickstart_rows(4)
    for name in ("one", "two"):
        compared.write_run(tmp_path / name, rows, str, updates=2000)
    with (tmp_path / "one" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"split": "train", "step": 2001, "loss": None, "non_finite": ["loss"]}) + "\n{torn")
    charts = comparing.curves_of(comparing.read_runs([tmp_path / "one", tmp_path / "two"], "dev"))
    assert list(charts) == list(comparing.CURVES)
    loss = charts["Loss"][0]
    assert (loss.x[0], loss.x[-1], len(loss.x), loss.split) == (1, 2000, 600, "train") and loss.y[0] == 5.0
    assert {curve.split for curve in charts["ROUGE mean on dev"]} == {"dev", "lead", "constant"}


def test_real_runs_compare(trained, tmp_path, capsys):
    """A run against its own copy: nothing is gained, and nothing can be said."""
    folder, results = trained
    twin = shutil.copytree(
        folder / "run", tmp_path / "twin", ignore=shutil.ignore_patterns("checkpoint-*", "final_model")
    )
    assert compare.main([str(folder / "run"), str(twin)]) == 0
    printed = capsys.readouterr().out
    assert "+0.00 [+0.00, +0.00]  1.000" in printed and "the recipes are the same" in printed
    assert f"{results['metrics']['rouge_mean']:.2f}" in printed and "the first" in printed and "always: " in printed
    assert compare.main([str(folder / "run"), str(twin), "--split", "test"]) == 0
    assert "5 test rows" in capsys.readouterr().out


def test_the_page_holds_everything_and_runs_nothing_of_the_data(page):
    text = page.read_text(encoding="utf-8")
    body = text[: text.index("<script>/*") if "<script>/*" in text else text.index("<script>")]
    assert HOSTILE not in text and html.escape(HOSTILE, quote=False).split("&gt;")[0] in text
    assert body.count("<article") == 100 and not re.search(r"""<(?:img|link|script|iframe)[^>]*(?:src|href)=""", body)
    assert "default-src 'none'" in text and text.count("</script>") == 2
    assert '"Malgun Gothic"' in text and "prefers-color-scheme: dark" in text


def test_without_plotly_it_says_what_to_install(three, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(EngineError, match=r"E2.78: .*plotly.*\[compare\]"):
        compare.main([*map(str, three), "--html", str(tmp_path / "page.html")])


def order_of(document: str) -> list[int]:
    return [int(place) for place in re.findall(r'<article class="row" data-row="(\d+)"', document)]


@pytest.mark.slow
def test_a_browser_opens_it_from_the_disk_without_a_network(page, three):
    seen = browser.see(page, "sort=gain-1")
    assert seen.console == [], "no error, and no request that its policy would have refused"
    assert "<title>base, longer, wide</title>" in seen.document, "no script of the data has run"
    assert seen.document.count('class="main-svg"') >= 9, "the charts are drawn"
    gains = [after - before for before, after in zip(values(three[0]), values(three[1]), strict=True)]
    assert (
        order_of(seen.document) == sorted(range(100), key=lambda i: -round(gains[i], 4))
        and "100 dialogues" in seen.document
    )
    found = browser.see(page, "find=dev_7%20base")
    shown = re.findall(r'<article class="row" data-row="(\d+)"(?! hidden)>', found.document)
    assert 1 <= len(shown) < 100 and "7" in shown and f"{len(shown)} of 100 dialogues" in found.document


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_a_phone_and_a_desk(page, width):
    seen = browser.see(page, width=width)
    assert seen.console == [] and 'data-overflow="0"' in seen.document
    assert int(re.search(r'data-charts="(\d+)"', seen.document)[1]) >= 9

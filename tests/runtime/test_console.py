"""What a person sees: bars that fit the terminal, lines without one, durations, wrapped lines and commands."""

from __future__ import annotations

import shlex

import pytest
import runs
import screens
import tiny

from engine import predict, train
from engine.runtime import console, resume_hint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A run in a folder with a short name, so that its paths fit narrow terminals."""
    folder = tmp_path_factory.mktemp("c")
    test = tiny.write_rows(folder / "test.jsonl", 7)
    changes = {
        "data__test_file": str(test),
        "tracking__progress": True,
        "training__num_train_epochs": 2,
        "runtime__num_threads": 1,
    }
    return runs.write_recipe(folder, rows=24, **changes)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_run_fits_the_terminal(recipe, width, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    settings = [f"experiment.output_dir=run{width}", "evaluation.strategy=steps", "evaluation.steps=4"]
    with screens.terminal(width, monkeypatch) as screen:
        assert train.main([recipe.name, *settings]) == 0
    shown = "\n".join(screen.text)
    assert screen.overflows == sum(console.columns_of(word) > width for word in shown.split()), shown
    bars = [line for line in screen.history if line.startswith("train ")]
    assert len(bars) > 5 and all(console.columns_of(line) < width for line in bars)
    assert not [line for line in screen.text if line.startswith("train ")], "no bar is left behind, none printed anew"
    measured = [line for line in bars if "ETA" in line]
    assert any("ETA >" in line for line in measured), "before an evaluation was measured the time is a lower bound"
    assert any("ETA >" not in line for line in measured)
    assert all("loss" in line and "it" in line.rpartition(", ")[2] or width > 60 for line in measured), measured
    assert (width == 120) == any("tokens/s" in line for line in bars)
    assert not [line for line in screen.text if line.startswith("step ") and "/12" in line]
    assert f"run folder: run{width}" in shown and "12 updates in 2 epochs; 3 evaluations of 6 rows" in shown
    assert "cut at the length" in " ".join(shown.split())
    assert f"final model: run{width}/final_model" in shown and "best: step" in shown and "predict.py" in shown


def test_a_run_without_a_terminal_speaks_in_lines(recipe, monkeypatch, capsys):
    monkeypatch.chdir(recipe.parent)
    assert train.main([recipe.name, "experiment.output_dir=piped"]) == 0
    captured = capsys.readouterr()
    assert "\r" not in captured.err + captured.out and "\x1b" not in captured.err
    said = captured.err.splitlines()
    steps = [line for line in said if line.startswith("step ") and "/12" in line]
    assert len(steps) == 12, said
    for word in ("epoch ", "loss ", "lr ", "tokens/s", "ETA "):
        assert all(word in line for line in steps), word
    assert max(map(console.columns_of, said)) <= 100
    before = [line for line in said if " evaluating 6 dev rows" in line]
    after = [line for line in said if "dev loss" in line]
    assert len(before) == len(after) == 2 and ", about " in before[1] and ", about " not in before[0]
    assert any(" evaluating 7 test rows" in line for line in said) and any(
        "7 test rows decoded in" in line for line in said
    )

    result = captured.out.splitlines()
    assert result[0].startswith("done: 12 updates in ") and result[1].startswith("best: step ")
    assert "final model: piped/final_model" in result and any(line.startswith("predictions: piped/") for line in result)
    log = (recipe.parent / "piped" / "train.log").read_text(encoding="utf-8")
    unwrapped = " ".join(log.split())
    assert all(" ".join(line.split()) in unwrapped for line in result), "the log has the result as well"

    words = shlex.split(result[-1])
    assert words[0] == "python" and (recipe.parent / words[1]).is_file()
    options = predict.parse(words[2:])
    assert (recipe.parent / options.model / "final_model").is_dir() and (recipe.parent / options.input).is_file()


def test_silence_on_request(recipe, monkeypatch, capsys):
    monkeypatch.chdir(recipe.parent)
    train.main([recipe.name, "experiment.output_dir=silent", "tracking.progress=false", "training.max_steps=2"])
    captured = capsys.readouterr()
    assert "step 1/" not in captured.err and "evaluating" not in captured.err
    assert "final model: " in captured.out


# Stopping


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["r.yaml"], ["r.yaml"]),
        (["r.yaml", "--resume", "auto", "training.seed=1"], ["r.yaml", "training.seed=1"]),
        (["--res=x/checkpoint-3", "r.yaml", "--debug"], ["r.yaml", "--debug"]),
        (["r.yaml", "experiment.output_dir=old", "experiment.notes=a b"], ["r.yaml", "experiment.notes=a b"]),
    ],
)
def test_the_command_that_goes_on(given, kept):
    words = resume_hint.resume_command(given, "my run", {})
    assert words[0] == "python" and words[1].endswith("train.py")
    assert words[2:] == [*kept, "--resume", "auto", "experiment.output_dir=my run"]


def test_the_command_of_several_ranks_has_their_launcher():
    launched = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    assert resume_hint.resume_command([], "run", launched)[:3] == ["torchrun", "--nproc_per_node", "4"]
    words = resume_hint.resume_command([], "run", launched | {"ACCELERATE_MIXED_PRECISION": "no"})
    assert words[:5] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "4"]
    assert resume_hint.resume_command([], "run", {"WORLD_SIZE": "1", "ACCELERATE_MIXED_PRECISION": "no"})[0] == "python"


# Words


def test_commands_can_be_copied_from_any_width():
    words = ["python", "engine/train.py", "r.yaml", "experiment.notes=세 단어 이상", "data.text_column=대화", "a" * 90]
    for width in (40, 60, 200):
        lines = console.wrap_command(words, width)
        assert shlex.split("\n".join(lines).replace("\\\n", "")) == words, "as a shell reads it"
        assert all(console.columns_of(line) <= width for line in lines if "a" * 90 not in line)


def test_hangul_without_spaces_is_cut_and_paths_are_not():
    lines = console.wrap("예측: " + "가" * 100 + " /tmp/" + "나" * 100, 60)
    assert all(console.columns_of(line) <= 60 for line in lines[:-1]) and lines[-1].strip() == "/tmp/" + "나" * 100
    assert "".join(line.strip() for line in lines[:-1]).count("가") == 100


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (725, "12m05s"), (3600, "1h00m"), (86400 * 2.2, "2d04h"), (float("inf"), "?")],
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def test_a_bar_ends_at_its_total(monkeypatch):
    with (
        screens.terminal(80, monkeypatch) as screen,
        console.meter(shown=True, total=5, desc="decode", unit="row") as bar,
    ):
        bar.update(4)
        bar.tqdm.refresh()
        bar.update(4)
        bar.tqdm.refresh()
    assert "| 5/5, ETA 0s" in "".join(screen.history), screen.history


def test_long_decoding_without_a_terminal_is_told_now_and_then(caplog, monkeypatch):
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    with caplog.at_level("INFO", logger="engine"), console.Lines(total=10, desc="decode dev", unit="row") as lines:
        for _ in range(10):
            lines.update(1)
    assert [message.split("  ")[1] for message in caplog.messages] == ["3/10", "6/10", "9/10"]
    assert all("ETA" in message and "s/row" in message for message in caplog.messages)

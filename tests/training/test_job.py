"""Between two updates: windows and their counts, the best so far, early stopping."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import runs
import torch

from engine.data.collate import IGNORE_INDEX, collate_causal
from engine.data.encode import Feature
from engine.data.windows import WindowSampler
from engine.evaluation import evaluate
from engine.recipe.schema import Recipe
from engine.runtime.ahead import Ahead
from engine.training import optim
from engine.training.job import Job, Learner, TrainingRows
from engine.training.state import TrainerState, Update


def learner_of(width: int = 3) -> Learner:
    model = torch.nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = optim.build_schedule(optimizer, Recipe().training, 10)
    return Learner(model, optimizer, schedule, torch.amp.GradScaler("cpu", init_scale=8.0))


def job_of(rank: int = 0, world_size: int = 1, **sections) -> Job:
    """A job over five rows of a causal model: one prompt token, then 1 to 5 supervised ones."""
    features = [Feature([5] + [6] * n, [IGNORE_INDEX] + [6] * n, index=n - 1) for n in range(1, 6)]
    sampler = WindowSampler(
        [feature.length for feature in features],
        micro_batch_size=2,
        accumulation_steps=1,
        world_size=world_size,
        rank=rank,
        strategy="sequential",
    )
    examples = [SimpleNamespace(id=f"row_{i}") for i in range(5)]
    return Job(
        recipe=Recipe(**sections),
        runtime=SimpleNamespace(
            progress=lambda **settings: None, show_progress=False, is_main=True, device=torch.device("cpu")
        ),
        bundle=SimpleNamespace(collate=lambda rows: collate_causal(rows, pad_token_id=0)),
        learner=learner_of(),
        rows=TrainingRows(examples, features, sampler),
        dev=None,
        summarizer=None,
        store=None,
        tracker=SimpleNamespace(run_dir=None, log_row=lambda row: None),
        state=TrainerState(),
    )


def test_a_window_counts_the_rows_of_all_ranks():
    window = job_of(rank=1, world_size=2).load_window(0, 0)
    assert window.ids == ["row_0", "row_1", "row_2", "row_3"]
    assert (window.tokens, window.all_tokens) == (1 + 2 + 3 + 4, 2 + 3 + 4 + 5)
    assert [batch["input_ids"].shape for batch in window.batches] == [(2, 5)]
    assert (window.cells, window.padding) == ((2 * 3 + 2 * 5,), (1 + 1,)), "of all ranks"


def test_a_row_of_the_log_says_how_much_was_padding():
    job, written = job_of(training={"logging_steps": 2, "num_train_epochs": 1}), []
    job.tracker.log_row, job.runtime.device = written.append, torch.device("cpu")
    job.progress.update = lambda *arguments: None
    for _ in range(3):
        window = job.load_window(job.state.epoch, job.state.window)
        update = Update(1.0, 1.0, 0.1, True)
        job.state.advance(window, update, updates_per_epoch=3)
        job.log_update(window, update)
    cells, padding = (2 * 3) + (2 * 5), 1 + 1
    assert [row["padding_share"] for row in written] == [padding / cells, 0.0], "since the last row only"
    assert not any("target" in key for row in written for key in row)


def test_a_rank_without_rows_takes_part_with_a_batch_that_supervises_nothing():
    window = job_of(rank=1, world_size=2).load_window(0, 1)
    assert window.ids == ["row_4"] and window.tokens == 5
    assert [set(batch["labels"].flatten().tolist()) for batch in window.batches] == [{IGNORE_INDEX}]


def test_a_job_beside_a_gpu_gets_the_same_windows():
    plain, ahead = job_of(), job_of()
    ahead.runtime.device = torch.device("cuda")
    ahead.__post_init__()
    assert isinstance(ahead.ahead, Ahead) and plain.ahead is None
    places = [(epoch, index) for epoch in range(2) for index in range(plain.sampler.updates_per_epoch)]
    for place in places:
        ours, theirs = ahead.load_window(*place), plain.load_window(*place)
        assert ours.ids == theirs.ids
        for one, other in zip(ours.batches, theirs.batches, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    worker = next(iter(ahead.ahead.thread._threads))
    ahead.progress, ahead.tracker = SimpleNamespace(close=list), SimpleNamespace(close=list)
    ahead.close()
    worker.join(timeout=10)
    assert not worker.is_alive(), "a process that fails waits a minute for its threads"


def test_a_learner_gets_its_states_back_and_refuses_those_of_another():
    first, second = learner_of(), learner_of()
    first.model(torch.ones(1, 3)).sum().backward()
    first.optimizer.step()
    first.schedule.step()
    second.load_states(SimpleNamespace(**first.states()))
    assert second.schedule.state_dict() == first.schedule.state_dict()
    assert second.scaler.get_scale() == 8.0
    for ours, theirs in zip(second.optimizer.state.values(), first.optimizer.state.values(), strict=True):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])
    states = first.states()
    states["optimizer"]["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError):
        learner_of().load_states(SimpleNamespace(**states))


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("rouge_mean", [3.0, 5.0, 5.0, 4.0], 2),  # a tie keeps the earlier one
        ("loss", [3.0, 2.0, math.nan, 2.5], 2),
        ("loss", [math.nan, None, 9.0, math.inf], 3),
        ("loss", [math.nan, None], None),
    ],
)
def test_the_best_evaluation(monkeypatch, metric, values, best):
    job = job_of(evaluation={"metric": metric})
    job.dev, job.runtime.is_main = SimpleNamespace(name="dev", examples=[1]), False
    for step, value in enumerate(values, start=1):
        scores = evaluate.Scores({"loss": 1.0, "seconds": 0.5} | {metric: value}, [])
        if value is None:
            del scores.metrics[metric]
        monkeypatch.setattr(evaluate, "evaluate", lambda *arguments, scores=scores: scores)
        monkeypatch.setattr("engine.training.nonfinite.check_evaluation", lambda *arguments: None)
        monkeypatch.setattr(job, "_log_evaluation", lambda scores: None)
        job.state.step = step
        job.evaluate()
    assert job.state.best_step == best and job.state.evaluated_step == len(values)


@pytest.mark.parametrize(
    ("training", "evaluating", "told"),
    [(80.0, 20.0, 1), (950.0, 50.0, 0), (2.0, 1.0, 0)],
    ids=["long", "fine", "short"],
)
def test_a_run_that_evaluates_for_long_is_told_once(caplog, training, evaluating, told):
    job = job_of()
    job.state.train_seconds, job.state.evaluation_seconds = training, evaluating
    for _ in range(2):
        job._tell_share()
    assert caplog.text.count("evaluations take") == told
    assert not told or ("20%" in caplog.text and "evaluation.max_samples" in caplog.text)


def test_early_stopping_and_best_by_loss(tmp_path):
    recipe = runs.write_recipe(
        tmp_path,
        training__num_train_epochs=20,
        training__learning_rate=1e-12,  # nothing changes: no evaluation is better than the first
        training__early_stopping_patience=2,
        evaluation__metric="loss",
    )
    results = runs.train(recipe)
    assert results["best_step"] == 6 and results["last_step"] == 18
    assert "no better loss in 2 evaluations" in results["stop_reason"]

"""The trials of a sweep: Optuna's study in a folder, and a training process for each trial, on several devices at once."""

from __future__ import annotations

import csv
import io
import math
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_process import GOES_ON, Failed, refuse_code, train

from engine.errors import EngineError
from engine.recipe.dump import dump
from engine.reporting.tracking import read_rows
from engine.runtime.atomic import read_json, write_text_atomically
from engine.runtime.lock import FolderLock
from engine.runtime.signals import Stopped
from engine.scoring.extra import key_of, less_is_better

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from search_space import Plan

_STATES = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
_NAME = "sweep"
_SEED = 42  # of the search; the runs have their recipe's
_LOOK = 0.5  # seconds between two looks at a trial's evaluations


# --- the table --------------------------------------------------------------------------------------------------------


def rows_of(trials: Iterable[FrozenTrial], plan: Plan, metric: str) -> list[dict[str, Any]]:
    """A row for each ended trial, in their order. A failure has no score; a pruned trial has its last one."""
    rows = []
    for trial in trials:
        if trial.state.name not in _STATES:
            continue
        head = {"trial": name_of(trial.number), "status": _STATES[trial.state.name], metric: trial.value}
        found = {key: trial.user_attrs.get(key) for key in ("step", "reason")}
        values = {axis.key: trial.params.get(axis.key) for axis in plan.axes}
        rows.append(head | {"step": found["step"]} | values | {"reason": found["reason"]})
    return rows


def name_of(number: int) -> str:
    return f"trial-{number:03}"


def ranked(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Best first; of equal ones the earlier. Then the pruned, then the failed."""
    sign = 1 if less_is_better(metric) else -1
    order = list(_STATES.values())
    return sorted(rows, key=lambda row: (order.index(row["status"]), sign * (row[metric] or 0)))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(path, text.getvalue())


# --- the sweep -------------------------------------------------------------------------------------------------------


class Sweep(AbstractContextManager):
    """A sweep's folder, locked.

    Args:
        plan: what to search. The folder's study, if there is one, must be of the same search of the same recipe.

    Raises:
        EngineError: E2.30 while another process sweeps there, E2.80 for a folder of something else, E2.82 without
            Optuna, E2.86 for a recipe that names code, E6.9 for a study that cannot be read.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        first = plan.recipe_of(next(plan.examples()))
        self.folder, self.plan, self.metric = folder, plan, first.evaluation.metric
        refuse_code(first)
        self._turn = threading.Lock()  # of the workers at the terminal and the table
        strangers = folder.is_dir() and any(entry.name[0] != "." for entry in folder.iterdir())
        if strangers and not (folder / "study.db").exists():
            raise EngineError(
                "E2.80", "the folder is not empty, and holds no sweep", str(folder), "use another --output"
            )
        optuna = _optuna()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        self._lock.acquire()
        try:
            self.storage = self._open(optuna)
            self.study = self._load(optuna)
            self._refuse_another({"recipe": dump(first), "--set": repr(plan.axes), "--search": plan.search})
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def _open(self, optuna: Any) -> optuna.storages.RDBStorage:
        from sqlalchemy.exc import DBAPIError

        path = self.folder.absolute() / "study.db"
        waiting = {"connect_args": {"timeout": 60}}  # seconds, for another worker's turn
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs=waiting)
            optuna.create_study(
                study_name=_NAME,
                storage=storage,
                direction="minimize" if less_is_better(self.metric) else "maximize",
                load_if_exists=True,
            )
        except DBAPIError as error:
            what = f"the sweep's study cannot be read: {error.orig}"
            raise EngineError("E6.9", what, str(path), "remove it and start again, or use another --output") from error
        return storage

    def _load(self, optuna: Any, number: int = 0) -> optuna.Study:
        """The study as the worker of one trial needs it.

        The search is seeded by the trial's number, so that a sweep proposes the same with and without an interruption.
        A grid is shuffled, by the same seed for all: the first trials of a grid are spread over it.
        """
        samplers, pruner = optuna.samplers, optuna.pruners.NopPruner()
        if self.plan.search == "grid":
            sampler = samplers.GridSampler({axis.key: axis.choices for axis in self.plan.axes}, seed=_SEED)
        elif self.plan.search == "random":
            sampler = samplers.RandomSampler(seed=_SEED + number)
        else:
            sampler, pruner = samplers.TPESampler(seed=_SEED + number), optuna.pruners.MedianPruner()
        return optuna.load_study(study_name=_NAME, storage=self.storage, sampler=sampler, pruner=pruner)

    def _refuse_another(self, plan: dict[str, str]) -> None:
        known = self.study.user_attrs.get("plan", plan)
        different = [key for key in plan if known.get(key) != plan[key]]
        if different:
            what = f"the folder holds a sweep with another {', '.join(different)}"
            raise EngineError("E2.80", what, str(self.folder), "use another --output")
        self.study.set_user_attr("plan", plan)

    # Running

    def run(self, gpus: list[str], parallel: int) -> None:
        """Bring every trial to its end, those first that were under way when the sweep was killed.

        Raises:
            Stopped: on Ctrl-C, or when a trial was stopped by a signal that is not ours.
        """
        optuna = _optuna()
        trials = self.study.get_trials(deepcopy=False)
        left = [trial.number for trial in trials if not trial.state.is_finished()]
        study_id = self.storage.get_study_id_from_name(_NAME)
        for number in left:  # a trial that waits is what Optuna hands out next, with its number and values
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
            self.storage.set_trial_state_values(trial_id, optuna.trial.TrialState.WAITING)
        todo = deque([*left, *range(len(trials), self.plan.trials)])
        print(f"{len(trials) - len(left)} of {max(len(trials), self.plan.trials)} trials are done", flush=True)
        with ThreadPoolExecutor(parallel) as pool:
            workers = [pool.submit(self._work, todo, gpus[n % len(gpus)] if gpus else None) for n in range(parallel)]
            try:
                for worker in workers:
                    worker.result()
            except KeyboardInterrupt:  # the trials have heard it too
                todo.clear()
                raise Stopped(f"stopped by SIGINT; {GOES_ON}", saved=True) from None
        self._write_table()

    def _work(self, todo: deque[int], gpu: str | None) -> None:
        optuna = _optuna()
        with suppress(IndexError):
            while True:
                study = self._load(optuna, todo.popleft())
                try:
                    study.optimize(lambda trial: self._trial(trial, gpu), n_trials=1, catch=(Failed,))
                except BaseException:
                    todo.clear()  # the other workers end with the trials that they have begun
                    raise
                self._write_table()

    def _trial(self, trial: optuna.Trial, gpu: str | None) -> float:
        """Train one trial, and tell Optuna each of its evaluations. Returns the score of its best checkpoint."""
        values = [axis.suggest(trial) for axis in self.plan.axes]
        name = name_of(trial.number)
        self._tell(f"{name} ... {' '.join(self.plan.overrides(values)[len(self.plan.fixed) :])}")
        try:
            value, step = self._score(trial, self._train(trial, name, values, gpu))
        except Failed as error:
            trial.set_user_attr("reason", str(error))
            self._tell(f"{name} failed: {error}")
            raise
        trial.set_user_attr("step", step)
        self._tell(f"{name} done: {self.metric} {value:.4f} at step {step}")
        return value

    def _write_table(self) -> None:
        with self._turn:
            write_csv(self.folder / "trials.csv", self.rows())

    def _tell(self, line: str) -> None:
        with self._turn:
            print(line, flush=True)

    def _train(self, trial: optuna.Trial, name: str, values: list[str], gpu: str | None) -> Path:
        """Run the process until its end; the run folder. Raises: Failed, Stopped, or Optuna's TrialPruned."""
        run = self.folder / name
        train(
            run, self.plan.recipe, self.plan.overrides(values), gpu, lambda process: self._follow(trial, process, run)
        )
        return run

    def _follow(self, trial: optuna.Trial, process: subprocess.Popen[bytes], run: Path) -> int:
        """Wait for the process. Evaluations are told one by one, in their order, however late they are seen."""
        code = None
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(_LOOK)
            self._tell_evaluations(trial, process, run)
        return code

    def _tell_evaluations(self, trial: optuna.Trial, process: subprocess.Popen[bytes], run: Path) -> None:
        told = trial.study.trials[trial.number].intermediate_values
        for row in read_rows(run / "metrics.jsonl"):
            value = row.get(key_of(self.metric))
            if row["split"] != "dev" or value is None or not math.isfinite(value) or row["step"] < max(told, default=0):
                continue
            if row["step"] not in told:
                trial.report(value, row["step"])
            if trial.should_prune():  # the last one told is asked about again: a kill may have come between
                process.send_signal(signal.SIGTERM)  # it saves; nothing happens where it has ended already
                process.wait()
                trial.set_user_attr("step", row["step"])
                self._tell(f"{name_of(trial.number)} pruned: {self.metric} {value:.4f} at step {row['step']}")
                raise _optuna().TrialPruned

    def _score(self, trial: optuna.Trial, run: Path) -> tuple[float, int]:
        record = read_json(run / "results.json")
        value = record["best_value"]
        if value is None:
            raise Failed(f"no evaluation brought a {self.metric}")
        return value, record["best_step"]

    # Results

    def rows(self) -> list[dict[str, Any]]:
        return rows_of(self.study.get_trials(deepcopy=False), self.plan, self.metric)

    def write_best(self) -> Path:
        """The best trial's recipe, resolved. Raises: EngineError E2.81 where no trial came to a score."""
        best = ranked(self.rows(), self.metric)[0]
        if best["status"] != "done":
            what = "no trial came to a score"
            raise EngineError("E2.81", what, str(self.folder), "trials.csv has the reasons", safe="their logs are kept")
        values = [str(best[axis.key]) for axis in self.plan.axes]
        said = f"# {best['trial']}, the best of {len(self.rows())} trials: {self.metric} {best[self.metric]:.4f}\n"
        path = self.folder / "best.yaml"
        write_text_atomically(path, said + dump(self.plan.recipe_of(values)))
        return path


def _optuna() -> Any:
    """Raises: EngineError E2.82 where Optuna is not installed."""
    try:
        import optuna
    except ImportError as error:
        next = "pip install -c constraints.txt -e '.[sweep]'"
        raise EngineError("E2.82", f"a sweep needs {error.name}", "", next) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # failures and pruned trials are told by us
    return optuna

"""Cross-validation: folds whose near-duplicates stay together, a training process for each, predictions of every row.

A folder of folds holds `folds.json` (which row belongs to which fold, and hashes of everything that decides it),
`recipe.yaml`, for each fold `train-<k>.jsonl`, `dev-<k>.jsonl`, the run folder `fold-<k>` and its log, and the results.
"""

from __future__ import annotations

import random
import signal
import subprocess
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ensemble import read_predictions
from inspecting import NEAR, Row, families
from pages import needed
from sweeping import write_csv
from training_process import GOES_ON, Failed, train
from written_rows import as_row, json_lines

from engine.data.rows import Example, rows_fingerprint
from engine.errors import EngineError
from engine.recipe.dump import dump
from engine.runtime.atomic import read_json, write_json_atomically, write_text_atomically
from engine.runtime.lock import FolderLock
from engine.runtime.run_status import finished
from engine.runtime.signals import Stopped
from engine.scoring import intervals, rouge

if TYPE_CHECKING:
    from engine.recipe.schema import Recipe

_MANIFEST, _RECIPE = "folds.json", "recipe.yaml"
_QUARTERS = 4  # of dialogue length: every fold gets short and long ones alike


def split(examples: Sequence[Example], folds: int, seed: int, least: float = NEAR) -> tuple[list[int], list[int]]:
    """For each row its fold (from 0) and its family: rows with equal or nearly equal dialogues are of one family.

    Families stay together, and folds get like numbers of rows and like lengths of dialogues, as far as families allow it.

    Args:
        least: similarity (0..1) from which dialogues are nearly equal.

    Raises:
        EngineError: E2.78 without scikit-learn or datasketch, E3.75 for fewer families than folds, or a family that is
            larger than two folds.
    """
    selection = needed("sklearn.model_selection", "kfold", "cross-validation")
    family = families([Row("train", example) for example in examples], least)
    sizes = Counter(family)
    largest = max(sizes.values())
    if len(sizes) < folds or largest * folds > 2 * len(examples):
        what = f"{len(examples)} rows in {len(sizes)} families of near-duplicates, the largest of {largest}"
        what += f", make no {folds} folds"
        raise EngineError("E3.75", what, "", "fewer --folds, or call fewer rows nearly equal by a higher --alike")
    names = random.Random(seed).sample(range(len(examples)), len(examples))  # which of equals comes first is the seed's
    order = sorted(range(len(examples)), key=lambda row: (len(examples[row].dialogue), row))
    quarters = min(_QUARTERS, len(examples) // folds)
    quarter = {row: place * quarters // len(order) for place, row in enumerate(order)}
    groups = [names[number] for number in family]
    splitter = selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    fold_of = [0] * len(examples)
    parts = splitter.split(groups, [quarter[row] for row in range(len(examples))], groups)
    for number, (_, held_out) in enumerate(parts):
        for row in held_out.tolist():
            fold_of[row] = number
    if len(set(fold_of)) < folds:
        raise EngineError("E3.75", f"{len(sizes)} families leave a fold empty", "", "fewer --folds")
    return fold_of, family


@dataclass
class Fold:
    """What came of one fold. `predictions` and `scores` are those of its held-out rows, in the order of the file."""

    number: int
    places: list[int]  # of the held-out rows in the data
    reason: str = ""  # why it failed
    step: int | None = None
    predictions: list[str] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    test: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return bool(self.scores)


def _predicted(path: Path, ids: Sequence[str]) -> list[str]:
    """Texts in the rows' order. Raises: ValueError where the file holds other rows, EngineError E3.50 where it is none."""
    found = read_predictions(path, "id", "prediction").candidates
    if list(found) != list(ids):
        raise ValueError(f"{path} holds other rows")
    return [texts[0] for texts in found.values()]


def table_row(name: str, scores: Sequence[dict[str, float]], fold: Fold | None, rows: int) -> dict[str, Any]:
    """A line of folds.csv: means over rows, and the 95 % interval of rouge_mean. `fold` None: all folds."""
    status = "done" if scores else "failed" if fold and fold.reason else "open"
    held_out = len(fold.places) if fold else rows
    row = {"fold": name, "status": status, "train_rows": rows - held_out if fold else None, "dev_rows": held_out}
    row["step"] = fold.step if fold else None
    row |= {key: sum(own[key] for own in scores) / len(scores) if scores else None for key in rouge.METRICS}
    interval = intervals.bootstrap_interval([own["rouge_mean"] for own in scores]) if scores else (None,) * 3
    row |= dict(zip(("rouge_mean", "low", "high"), interval, strict=True))
    return row | {"reason": fold.reason if fold else ""}


class Folds(AbstractContextManager):
    """A folder of folds, locked; files and manifest are written.

    Args:
        recipe: with the overrides; its `data.train_file` is divided.
        examples: the rows of the training file.
        test: those of the test file, predicted by every fold.

    Raises:
        EngineError: E2.30 while another process is at work there, E2.80 for a folder of something else or of other data,
            settings or seed, and as `split`.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        examples: Sequence[Example],
        test: Sequence[Example],
        *,
        folds: int,
        seed: int,
        least: float,
    ) -> None:
        self.folder, self.recipe = folder, recipe
        self.examples, self.test = examples, test
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._turn, self._stopped_by = Lock(), ""
        strangers = folder.is_dir() and any(entry.name[0] != "." for entry in folder.iterdir())
        if strangers and not (folder / _MANIFEST).exists():
            what = "the folder is not empty, and holds no folds"
            raise EngineError("E2.80", what, str(folder), "use another --output")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder, advice="wait for it, or use another --output")
        self._lock.acquire()
        try:
            self.fold_of = self._divided(folds, seed, least)
            self.folds = [
                Fold(number, [row for row, fold in enumerate(self.fold_of) if fold == number])
                for number in range(folds)
            ]
            self._write_files()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    # Files

    def _divided(self, folds: int, seed: int, least: float) -> list[int]:
        """The fold of every row: what the manifest says, which is written the first time."""
        path = self.folder / _MANIFEST
        plan = {
            "data": rows_fingerprint(self.examples),
            "test": rows_fingerprint(self.test),
            "recipe": dump(self.recipe),
            "folds": folds,
            "seed": seed,
            "alike": least,
        }
        if path.exists():
            known = read_json(path)
            different = [key for key, value in plan.items() if known.get(key) != value]
            if different:
                what = f"the folder holds folds of another {', '.join(different)}"
                raise EngineError("E2.80", what, str(self.folder), "use another --output")
            return known["fold_of"]
        fold_of, family = split(self.examples, folds, seed, least)
        record = plan | {"rows": len(fold_of), "families": len(set(family)), "family_of": family, "fold_of": fold_of}
        write_json_atomically(path, record)
        return fold_of

    def _write_files(self) -> None:
        """The recipe, and every fold's two files, in JSON lines; those that are as they should be stay as they are."""
        self._write(self.folder / _RECIPE, dump(self.recipe))
        ascii_only = self.recipe.data.encoding != "auto"  # readable in every encoding that a recipe may name
        rows = [as_row(example, self.recipe.data) for example in self.examples]
        for fold in self.folds:
            for name, inside in (("train", False), ("dev", True)):
                own = [row for row, number in zip(rows, self.fold_of, strict=True) if (number == fold.number) == inside]
                self._write(self._file(name, fold), json_lines(own, ascii_only=ascii_only))

    def _write(self, path: Path, text: str) -> None:
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            write_text_atomically(path, text)

    def _file(self, name: str, fold: Fold) -> Path:
        return self.folder / f"{name}-{fold.number + 1}.jsonl"

    def _run(self, fold: Fold) -> Path:
        return self.folder / f"fold-{fold.number + 1}"

    # Running

    def run(self, gpus: Sequence[str], parallel: int) -> None:
        """Bring every fold to its end, and read what came of it. Failures keep their reason; the others go on.

        Raises:
            Stopped: by SIGTERM or Ctrl-C, once the runs under way have saved.
        """
        todo = deque(self.folds)
        with self._signals_passed_on(), ThreadPoolExecutor(parallel) as pool:
            workers = [pool.submit(self._work, todo, gpus[n % len(gpus)] if gpus else None) for n in range(parallel)]
        for worker in workers:
            worker.result()
        if self._stopped_by:
            raise Stopped(f"stopped by {self._stopped_by}; {GOES_ON}", saved=True)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        """Stop signals go to the trainings, which save and end; nothing new is begun."""

        def stop(number: int, frame: Any) -> None:
            self._stopped_by = signal.Signals(number).name
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)

        old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _follow(self, process: subprocess.Popen[bytes]) -> int:
        self._processes.add(process)
        if self._stopped_by:  # between its start and now
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        self._processes.discard(process)
        return code

    def _work(self, todo: deque[Fold], gpu: str | None) -> None:
        while not self._stopped_by:
            try:
                fold = todo.popleft()
            except IndexError:
                return
            try:
                self._bring_to_end(fold, gpu)
            except Failed as failure:
                fold.reason = str(failure)
                self._tell(f"fold {fold.number + 1} failed: {fold.reason}")
            except BaseException:
                todo.clear()  # the other workers end with the folds that they have begun
                raise

    def _bring_to_end(self, fold: Fold, gpu: str | None) -> None:
        run, name = self._run(fold), f"fold {fold.number + 1}"
        known = finished(run) and (run / "results.json").is_file()
        if not known:
            self._tell(f"{name} ... {len(self.examples) - len(fold.places)} rows, {len(fold.places)} held out")
            own = [f"data.train_file={self._file('train', fold)}", f"data.validation_file={self._file('dev', fold)}"]
            own += ["data.max_train_samples=null", "data.max_validation_samples=null"]
            train(run, str(self.folder / _RECIPE), own, gpu, self._follow)
        self._read(fold, run)
        means = rouge.mean_scores(fold.scores, self.recipe.evaluation.rouge_tokenizer)
        self._tell(
            f"{name} {'was done' if known else 'done'}: rouge_mean {means['rouge_mean']:.2f} at step {fold.step}"
        )

    def _read(self, fold: Fold, run: Path) -> None:
        """Raises: Failed where the run left no prediction of its rows."""
        try:
            fold.step = read_json(run / "results.json")["best_step"]
            held_out, numbered = [self.examples[place] for place in fold.places], self.recipe.data.id_column is None
            ids = [str(place) if numbered else row.id for place, row in enumerate(held_out, start=1)]
            predictions = _predicted(run / "predictions" / f"dev-step{fold.step}.csv", ids)
            if self.test:
                path = run / "predictions" / f"test-step{fold.step}.csv"
                fold.test = _predicted(path, [row.id for row in self.test])
            references = [row.references for row in held_out]
            fold.scores = rouge.rouge_rows(predictions, references, self.recipe.evaluation.rouge_tokenizer)
            fold.predictions = predictions
        except (EngineError, OSError, ValueError, KeyError) as error:
            raise Failed(f"its predictions cannot be used: {error}; remove {run} to train it again") from error

    def _tell(self, line: str) -> None:
        with self._turn:
            print(line, flush=True)

    # Results

    def table(self) -> list[dict[str, Any]]:
        """A row for each fold and, where all are done, one for all rows together."""
        rows = [table_row(str(fold.number + 1), fold.scores, fold, len(self.examples)) for fold in self.folds]
        if all(fold.done for fold in self.folds):
            rows.append(table_row("all", [score for _, score in self._by_row()], None, len(self.examples)))
        return rows

    def _by_row(self) -> list[tuple[str, dict[str, float]]]:
        """Prediction and scores of every row, in the data's order."""
        found = {
            place: (text, score)
            for fold in self.folds
            for place, text, score in zip(fold.places, fold.predictions, fold.scores, strict=True)
        }
        return [found[place] for place in range(len(self.examples))]

    def write(self) -> None:
        """folds.csv, and out_of_fold.csv where all folds are done: a row for each training row, in their order."""
        write_csv(self.folder / "folds.csv", self.table())
        if all(fold.done for fold in self.folds):
            rows = [
                as_row(example, self.recipe.data, fold=number + 1, prediction=text)
                | {key: score[key] for key in (*rouge.METRICS, "rouge_mean")}
                for example, number, (text, score) in zip(self.examples, self.fold_of, self._by_row(), strict=True)
            ]
            write_csv(self.folder / "out_of_fold.csv", rows)

"""What a user brings without editing the engine: metrics beside ROUGE, and callbacks."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import EngineError
from engine.models import hub
from engine.models.tokenization import load_tokenizer
from engine.models.weights import quiet_transformers
from engine.runtime.faults import at_line, blaming, first_line
from engine.scoring import extra
from engine.scoring.bertscore import BertScore
from engine.training.evaluation import same_random_state

if TYPE_CHECKING:
    from engine.recipe.schema import Evaluation, Recipe
    from engine.runtime.process import Runtime

log = logging.getLogger("engine.train")
HOOKS = ("on_log", "on_evaluation", "on_save", "on_end")
_ROOT = Path(__file__).resolve().parents[2]
_INSTALL = "install it (pip install -e FOLDER), and start elsewhere than in its folder"


class Callbacks:
    """Calls the user's hooks, on the main rank. The first that fails is the last one called: the run saves and ends.

    Args:
        objects: each with some of the methods `on_log(row)`, `on_evaluation(row)`, `on_save(path)`, `on_end(results)`.
        stop: asks the loop to stop at its next boundary.

    Raises:
        EngineError: E2.84 for an object without such a method, or with another one named `on_...`.
    """

    def __init__(self, objects: Sequence[Any] = (), *, is_main: bool = True, stop: Callable[[str], None] | None = None):
        for item in objects:
            named = {name for name in dir(item) if name.startswith("on_")}
            if not named or not named <= set(HOOKS):
                wrong = f"has {', '.join(sorted(named - set(HOOKS)))}" if named else "has no method of ours"
                what = f"a callback of type {type(item).__name__} {wrong}"
                raise EngineError("E2.84", what, "callbacks", f"there are {', '.join(HOOKS)}")
        self.objects, self.stop = (list(objects) if is_main else []), stop
        self.failure: EngineError | None = None

    def call(self, hook: str, value: Any, step: int) -> None:
        for item in self.objects if self.failure is None else ():
            try:
                getattr(item, hook, _nothing)(dict(value) if isinstance(value, Mapping) else value)
            except Exception as error:  # code of the user's
                what = f"callback {type(item).__name__}.{hook} failed{at_line(error)}: {first_line(error)}"
                self.failure = EngineError("E2.85", what, f"step {step}", "correct it, then --resume auto")
                self.failure.__cause__ = error
                if self.stop is not None:
                    self.stop("a callback failed")
                return

    def failed(self, safe: str) -> EngineError | None:
        """The failure, saying what is safe; None where all went well."""
        if self.failure is not None:
            self.failure = _with_safe(self.failure, safe)
        return self.failure


def _nothing(value: Any) -> None:
    """The hook that an object does not have."""


def _with_safe(error: EngineError, safe: str) -> EngineError:
    told = EngineError(error.code, error.what, error.where, error.next, safe=safe)
    told.__cause__ = error.__cause__
    return told


@dataclass
class Extras:
    """Metrics by name, and callbacks; none by default."""

    metrics: Mapping[str, extra.Metric] = field(default_factory=dict)
    callbacks: Callbacks = field(default_factory=Callbacks)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        runtime: Runtime,
        metrics: Mapping[str, extra.Metric],
        callbacks: Sequence[Any],
        *,
        allow_code: bool,
    ) -> Extras:
        """What `run` was given, and what the recipe names.

        Raises:
            EngineError: E2.83 for names that cannot be, E2.84 for callbacks that are none, E2.86 for code that the user has
                not allowed or that is not installed, E4 for BERTScore's model.
        """
        with runtime.ranks.together("preparing metrics and callbacks"), same_random_state(runtime):
            found = {**_named_by(recipe.evaluation, runtime, allow_code=allow_code), **metrics}
            _check_names(recipe.evaluation, found, metrics)
            hooks = Callbacks(callbacks, is_main=runtime.is_main, stop=runtime.signals.ask)
        return cls(found, hooks)


def _named_by(settings: Evaluation, runtime: Runtime, *, allow_code: bool) -> dict[str, extra.Metric]:
    """The recipe's own, by the name of their function."""
    found: dict[str, extra.Metric] = {}
    for name in settings.extra_metrics:
        if name == "bertscore":
            found[name] = _bertscore(settings, runtime)
        elif not allow_code:
            what = f"the recipe names code to run: {name}"
            advice = "read that code; then give --allow-code (from Python: allow_code=True)"
            raise EngineError("E2.86", what, "evaluation.extra_metrics", advice)
        else:
            found[name.partition(":")[2]] = installed(name)
    return found


def _check_names(settings: Evaluation, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, metric in found.items():
        taken = name in extra.TAKEN or (name == "bertscore" and name in given)
        if taken or not name.isidentifier() or not callable(metric):
            what = f"{name!r} cannot be a metric: its name is taken, or no name, or it is no function"
            raise EngineError("E2.83", what, "metrics", "give it another name, of letters, digits and underscores")
    if given and not settings.generate:
        what = "metrics score summaries, and evaluation.generate is false"
        raise EngineError("E2.83", what, "metrics", "set evaluation.generate: true")
    wanted = extra.key_of(settings.metric)
    if ":" in settings.metric and wanted not in found:
        there = f"there are {', '.join(found)}" if found else "none was given"
        what = f"evaluation.metric is {settings.metric}, and there is no metric {wanted}: {there}"
        raise EngineError(
            "E2.83", what, "evaluation.metric", "name it in evaluation.extra_metrics, or give run(metrics=...)"
        )


# Installed code


def installed(name: str) -> extra.Metric:
    """The function that `module:function` names, from an installed module.

    What only happens to lie in the working directory, beside the engine or in a run folder is not taken, nor is the standard
    library, which holds no metric but many a function that does harm when it is given texts.

    Raises:
        EngineError: E2.86.
    """
    module, _, function = name.partition(":")
    top = module.partition(".")[0]
    spec = None if top in sys.stdlib_module_names else _installed_spec(top)
    if spec is None:
        raise EngineError("E2.86", f"{top} is no installed module", f"evaluation.extra_metrics: {name}", _INSTALL)
    first = importlib.util.find_spec(top)
    if _places(first) != _places(spec):
        what = f"{top} would be imported from {_places(first)}, which hides the installed one"
        raise EngineError(
            "E2.86", what, f"evaluation.extra_metrics: {name}", "start from another folder, or rename that one"
        )
    with blaming("E2.86", f"{name} cannot be imported", "evaluation.extra_metrics", "try it in Python first"):
        found = getattr(importlib.import_module(module), function)
    log.info("metric %s from %s", function, _places(spec))
    return found


def _installed_spec(top: str) -> ModuleSpec | None:
    """As the import system finds a module, but for places that nobody installed anything in."""
    accident = {Path.cwd(), _ROOT, _ROOT / "engine", _ROOT / "tools"}
    path = [entry for entry in sys.path if entry and Path(entry).resolve() not in accident]
    for finder in sys.meta_path:  # those of editable installs beside Python's own
        found = PathFinder.find_spec(top, path) if finder is PathFinder else finder.find_spec(top, None)
        if found is not None:
            return found
    return None


def _places(spec: ModuleSpec | None) -> str:
    if spec is None:
        return "nowhere"
    return spec.origin or os.pathsep.join(map(str, spec.submodule_search_locations or ())) or spec.name


# BERTScore


def _bertscore(settings: Evaluation, runtime: Runtime) -> extra.Metric:
    """Raises: EngineError E4 where the folder holds no model with safetensors, E2.83 for a layer that it has not."""
    from transformers import AutoModel

    if not runtime.is_main:
        return _nothing  # never called: the main rank scores
    folder = Path(settings.bertscore_model).expanduser()
    if not folder.is_dir():
        raise EngineError("E4.1", "no such model folder", str(folder), "check evaluation.bertscore_model")
    folder = hub.resolve(str(folder))
    with hub.blaming_folder(folder), quiet_transformers():
        safely = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, **safely)
        tokenizer = load_tokenizer(folder)
        layers = model.config.num_hidden_layers
    layer = settings.bertscore_layer or -(-3 * layers // 4)
    if layer > layers:
        what = f"evaluation.bertscore_layer is {layer}, and the model has {layers} layers"
        raise EngineError("E2.83", what, str(folder), "choose one of them")
    return BertScore(model, tokenizer, layer, runtime.device)

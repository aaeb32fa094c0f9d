"""What a user brings without editing the engine: metrics beside ROUGE, and callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import EngineError
from engine.evaluation.evaluate import same_random_state
from engine.models import hub
from engine.models.tokenization import load_tokenizer
from engine.models.weights import quiet_transformers
from engine.reporting.callbacks import Callbacks
from engine.runtime.installed import installed
from engine.scoring import extra
from engine.scoring.bertscore import BertScore

if TYPE_CHECKING:
    from engine.recipe.schema import Evaluation, Recipe
    from engine.runtime.process import Runtime


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


def _bertscore(settings: Evaluation, runtime: Runtime) -> extra.Metric:
    """Raises: EngineError E4 where the folder holds no model with safetensors, E2.83 for a layer that it has not."""
    from transformers import AutoModel

    if not runtime.is_main:
        return len  # never called: the main rank scores
    folder = Path(settings.bertscore_model).expanduser()
    if not folder.is_dir():
        raise EngineError("E4.1", "no such model folder", str(folder), "check evaluation.bertscore_model")
    folder = hub.resolve(str(folder))
    with hub.blaming_folder(folder), quiet_transformers():
        safely = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **safely)
        if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
            what = f"{len(missing)} weights of BERTScore's model are missing and would be random: {missing[0]}, ..."
            raise EngineError("E4.8", what, str(folder), "use the folder of a whole encoder")
        tokenizer = load_tokenizer(folder)
        layers = model.config.num_hidden_layers
    layer = settings.bertscore_layer or -(-3 * layers // 4)
    if layer > layers:
        what = f"evaluation.bertscore_layer is {layer}, and the model has {layers} layers"
        raise EngineError("E2.83", what, str(folder), "choose one of them")
    return BertScore(model, tokenizer, layer, runtime.device)

"""A finished model for programs that do not know this package: its generation settings in full, and a card that explains it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models import weights
from engine.models.hub import OWN_GENERATION_FILE
from engine.prediction.postprocess import RULES
from engine.prediction.summarizer import Summarizer

if TYPE_CHECKING:
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Generation, Recipe

_LOAD = """```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("final_model")
model = {auto}.from_pretrained("final_model")
```"""
_LOAD_ADAPTER = """```python
from peft import {auto}
from transformers import AutoTokenizer, GenerationConfig

tokenizer = AutoTokenizer.from_pretrained("final_model")
model = {auto}.from_pretrained("final_model")  # finds the base model, and its generation settings with it
model.get_base_model().generation_config = GenerationConfig.from_pretrained("final_model")
```"""


def write_generation_config(folder: Path, bundle: ModelBundle, generation: Generation) -> None:
    """Put the resolved settings into a saved model's generation_config.json; the model's own stay beside it.

    Raises: EngineError E2.36 for settings that do not fit each other or the model; the folder is then as it was.
    """
    summarizer = Summarizer(bundle, bundle.text_encoder(), generation, batch_size=1)
    made = summarizer.settings.written_into(bundle.generation_config)
    own = folder / "generation_config.json"
    os.replace(own, folder / OWN_GENERATION_FILE)
    with weights.quiet_transformers():
        made.save_pretrained(folder)


def only_ours(generation: Generation, family: str) -> list[str]:
    """Settings of the section that a plain `generate` does not follow, one line each."""
    scope = generation.repetition_scope
    scope = ("output" if family == "causal" else "all") if scope == "auto" else scope
    repeats = generation.repetition_penalty != 1 or generation.no_repeat_ngram_size
    found = [f"`{name}`: {getattr(generation, name)}" for name in ("block_scripts", "allow_scripts", "stop_strings")]
    found = [line for line in found if not line.endswith((": []", ": None"))]
    if generation.keep_source_words:
        found.append("`keep_source_words`: foreign words of the dialogue pass the script rules")
    if scope == "output" and repeats:
        found.append(
            "`repetition_scope: output`: repetition rules look at the summary only, `generate`'s at the prompt too"
        )
    return found + [f"`{rule}`: {value}" for rule in sorted(RULES) if (value := getattr(generation, rule))]


def card(recipe: Recipe, bundle: ModelBundle, record: dict[str, Any] | None = None) -> str:
    """The text of a model card: how the model was made, what it scored, and how it is loaded.

    Args:
        record: what results.json holds; None for a model merged from an adapter, whose scores nobody measured.
    """
    data = {name: getattr(recipe.data, f"{name}_file") for name in ("train", "validation", "test")}
    made = [
        f"- recipe: `{recipe.experiment.name}`, in full in `recipe.yaml`",
        f"- base model: `{bundle.base.name}`" + (f" at `{bundle.base.revision}`" if bundle.base.revision else ""),
        *(f"- {name} data: `{Path(file).name}`" for name, file in data.items() if file),
        f"- {_origin(record)}",
    ]
    measured = {"validation": "metrics", "test": "test_metrics"} if record else {}
    scores = [_scores(name, record[key]) for name, key in measured.items()]
    auto = "ForCausalLM" if bundle.family == "causal" else "ForSeq2SeqLM"
    adapted = weights.is_adapted(bundle.model)
    load = (_LOAD_ADAPTER if adapted else _LOAD).format(auto=("AutoPeftModel" if adapted else "AutoModel") + auto)
    ours = only_ours(recipe.generation, bundle.family)
    rules = [f"- {line}" for line in ours] or ["- none: it writes the same texts"]
    parts = [
        f"# {recipe.experiment.name}",
        "Summarises Korean dialogues.",
        "## How it was made",
        "\n".join(made),
        "## Scores",
        "\n".join(line for line in scores if line) or "It was not evaluated.",
        "## Loading it",
        load,
        "`model.generate(**inputs)` then decodes as the run did: its settings are in `generation_config.json`. The inputs are "
        "prompts in the form that `prompt_settings.json` describes. The engine that trained it makes them itself:",
        "```bash\npython engine/predict.py final_model --input dialogues.csv --output summaries.csv\n```",
        "What the engine does and plain `generate` does not:",
        "\n".join(rules),
    ]
    return "\n\n".join(parts) + "\n"


def _origin(record: dict[str, Any] | None) -> str:
    if record is None:
        return "merged from an adapter"
    judged = "the last" if record["best_value"] is None else f"the best by {record['best_metric']}"
    return f"update {record['best_step']}, {judged}"


def _scores(split: str, metrics: dict[str, Any] | None) -> str:
    """One line of measured values; empty where there are none."""
    if not metrics:
        return ""
    values = [f"loss {metrics['loss']:.4f}"] if metrics.get("loss") is not None else []
    if metrics.get("rouge1") is not None:
        f1 = " / ".join(f"{metrics[name]:.2f}" for name in ("rouge1", "rouge2", "rougeL"))
        values.append(f"ROUGE-1/2/L {f1} (F1 x 100, tokenizer {metrics['rouge_tokenizer']})")
    return f"- {split}: {', '.join(values)}" if values else ""

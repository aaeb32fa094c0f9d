"""The model card, `README.md` of a finished model: front matter that the hub reads, and what a person has to know.

Names of files and models are somebody's text: they stand in code spans that no text can leave, or in YAML that the hub's own
library writes. No row of the data is quoted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import redact
from engine.models.weights import is_adapted
from engine.prediction.export import code, one_line, only_ours
from engine.scoring.rouge import METRICS

if TYPE_CHECKING:
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Recipe

_SPLITS = {"dev": ("validation", "metrics"), "test": ("test", "test_metrics")}  # the hub's name, the record's key
_TITLES = ("ROUGE-1", "ROUGE-2", "ROUGE-L")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_LOAD = """```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("final_model")  # this folder, or its name on the hub
model = {auto}.from_pretrained("final_model")
```"""
_LOAD_ADAPTER = """```python
from peft import {auto}
from transformers import AutoTokenizer, GenerationConfig

tokenizer = AutoTokenizer.from_pretrained("final_model")  # this folder, or its name on the hub
model = {auto}.from_pretrained("final_model")  # finds the base model, and its generation settings with it
model.get_base_model().generation_config = GenerationConfig.from_pretrained("final_model")
```"""
_USE = (
    "It writes a short Korean summary of a Korean dialogue whose turns begin with a speaker's name and a colon, one turn a "
    "line, as in `#Person1#: ...`. It is meant for dialogues like those it was trained on."
)
_LIMITS = """- A summary may leave out or change facts, names and numbers, and may put words into the wrong speaker's mouth.
  Let a person check what matters.
- Other kinds of text, other languages and longer dialogues were not tried; what exceeds {source} input tokens is cut.
- ROUGE counts words in common with a reference. It does not see whether a summary is true.
- What the training data and the base model hold of bias or private matters may come out again. Their licences apply too."""


def card(recipe: Recipe, bundle: ModelBundle, record: Mapping[str, Any] | None = None) -> str:
    """The text of a model card.

    Args:
        record: what results.json holds; None for a model merged from an adapter, whose scores nobody measured.
    """
    adapted = is_adapted(bundle.model)
    auto = ("AutoPeftModel" if adapted else "AutoModel") + (
        "ForCausalLM" if bundle.family == "causal" else "ForSeq2SeqLM"
    )
    rules = [f"- {line}" for line in only_ours(recipe.generation, bundle.family)]
    parts = [
        f"---\n{_front_matter(recipe, bundle, record, adapted=adapted)}\n---",
        f"# {recipe.experiment.name}",
        "Summarises Korean dialogues.",
        "## Use",
        _USE,
        "## Limits",
        _LIMITS.format(source=bundle.lengths["max_source_length"]),
        "## Scores",
        _scores(record) or "It was not evaluated.",
        "## How it was made",
        _made(recipe, bundle, record),
        "## Loading it",
        (_LOAD_ADAPTER if adapted else _LOAD).format(auto=auto),
        "`model.generate(**inputs)` then decodes as the run did: its settings are in `generation_config.json`. The inputs are "
        "prompts in the form that `prompt_settings.json` describes. The engine that trained it makes them itself:",
        "```bash\npython engine/predict.py final_model --input dialogues.csv --output summaries.csv\n```",
        "What the engine does and plain `generate` does not:",
        "\n".join(rules) or "- none: it writes the same texts",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(recipe: Recipe, bundle: ModelBundle, record: Mapping[str, Any] | None, *, adapted: bool) -> str:
    """YAML as the hub's library writes it. The licence is the user's to fill in; a base in a folder is nobody's on the hub."""
    from huggingface_hub import ModelCardData

    name = bundle.base.name
    on_hub = _HUB_ID.fullmatch(name) and redact(name) == name and not Path(name).expanduser().exists()
    based = {"base_model": name, "base_model_relation": "adapter" if adapted else "finetune"} if on_hub else {}
    data = ModelCardData(
        language="ko",
        license="unknown",
        library_name="peft" if adapted else "transformers",
        pipeline_tag="summarization",
        tags=["korean", "dialogue-summarization", *(["lora"] if adapted else [])],
        metrics=["rouge"],
        model_name=recipe.experiment.name,
        eval_results=_evaluations(recipe, record) or None,
        **based,
    )
    if data.eval_results is None:
        del data.model_name  # the hub knows the name as part of results only
    return data.to_yaml()


def _evaluations(recipe: Recipe, record: Mapping[str, Any] | None) -> list[Any]:
    """Entries of the hub's `model-index`: one for each metric and split."""
    from huggingface_hub import EvalResult

    found = []
    for split, metrics in _measured(record):
        file = getattr(recipe.data, f"{_SPLITS[split][0]}_file")
        found += [
            EvalResult(
                task_type="summarization",
                dataset_type="dialogue-summaries",
                dataset_name=one_line(Path(file).name),
                dataset_split=_SPLITS[split][0],
                dataset_revision=record["data"][f"{split}_sha256"],
                metric_type="rouge",
                metric_name=f"{title} (F1 x 100, {metrics['rouge_tokenizer']})",
                metric_value=round(metrics[key], 4),
                metric_args={"tokenizer": metrics["rouge_tokenizer_version"]},
            )
            for key, title in zip(METRICS, _TITLES, strict=True)
        ]
    return found


def _measured(record: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any]]]:
    """The splits that have summaries to be held against, with their scores."""
    splits = [(split, (record or {}).get(key)) for split, (_, key) in _SPLITS.items()]
    return [(split, metrics) for split, metrics in splits if metrics and metrics.get("rouge1") is not None]


def _scores(record: Mapping[str, Any] | None) -> str:
    """A table with the floors beside the scores; losses alone where nothing was decoded; empty without an evaluation."""
    measured = _measured(record)
    if not measured:
        loss = ((record or {}).get("metrics") or {}).get("loss")
        return "" if loss is None else f"Loss on the validation data: {loss:.4f}. No summaries were scored."
    head = ["split", "rows", *_TITLES, "mean", "95 % interval", "first turns", "one sentence"]
    rows = [
        [split, str(record["data"][f"{split}_rows"]), *_numbers([metrics[key] for key in (*METRICS, "rouge_mean")])]
        + [" to ".join(_numbers(record["intervals"][split] or [])), *_numbers(_floors(record, split))]
        for split, metrics in measured
    ]
    tokenizer = measured[0][1]
    told = (
        f"F1 x 100, tokenizer {tokenizer['rouge_tokenizer']} ({one_line(tokenizer['rouge_tokenizer_version'])}): scores by "
        "another tokenizer do not compare. The interval is of the mean, by a bootstrap over the rows. The last two columns are "
        "the mean of the dialogue's first turns, and of the one training sentence that scores best for all rows: what a model "
        "has to be above."
    )
    chosen = "The checkpoint was chosen by its dev score, which is therefore a little too good."
    return f"{table(head, rows)}\n\n{told}" + (f" {chosen}" if record["best_value"] is not None else "")


def _floors(record: Mapping[str, Any], split: str) -> list[float | None]:
    floors = record["baselines"].get(split)
    return [floors[name]["rouge_mean"] if floors else None for name in ("lead", "constant")]


def _numbers(values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.2f}" for value in values]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown. Cells are taken as they are, but for what would end them."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _made(recipe: Recipe, bundle: ModelBundle, record: Mapping[str, Any] | None) -> str:
    base = code(bundle.base.name) + (f" at {code(bundle.base.revision)}" if bundle.base.revision else "")
    lines = [f"- recipe: {code(recipe.experiment.name)}, in full in `recipe.yaml`", f"- base model: {base}"]
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        if file := getattr(recipe.data, f"{name}_file"):
            lines.append(f"- {name} data: {code(Path(file).name)}{_rows(record, split)}")
    if record is None:
        return "\n".join([*lines, "- merged from an adapter"])
    judged = "the last" if record["best_value"] is None else f"the best by {record['best_metric']}"
    made = record["code"]
    commit = f" at {made['commit']}{', changed' if made['dirty'] else ''}" if made["commit"] else ""
    libraries = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers", "peft"))
    return "\n".join(
        [*lines, f"- update {record['best_step']}, {judged}", f"- engine {made['version']}{commit}; {libraries}"]
    )


def _rows(record: Mapping[str, Any] | None, split: str) -> str:
    if not record or not record["data"][f"{split}_rows"]:
        return ""
    return f", {record['data'][f'{split}_rows']:,} rows, SHA-256 {record['data'][f'{split}_sha256']}"

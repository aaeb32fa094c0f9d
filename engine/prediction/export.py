"""A finished model for programs that do not know this package: its generation settings in full."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import printable, redact
from engine.models import weights
from engine.models.hub import OWN_GENERATION_FILE
from engine.prediction.postprocess import RULES
from engine.prediction.summarizer import Summarizer

if TYPE_CHECKING:
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Generation


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
    values = {name: getattr(generation, name) for name in ("block_scripts", "allow_scripts", "stop_strings")}
    found = [f"`{name}`: {code(str(value))}" for name, value in values.items() if value]
    if generation.keep_source_words:
        found.append("`keep_source_words`: foreign words of the dialogue pass the script rules")
    if scope == "output" and repeats:
        found.append(
            "`repetition_scope: output`: repetition rules look at the summary only, `generate`'s at the prompt too"
        )
    return found + [f"`{rule}`: {value}" for rule in sorted(RULES) if (value := getattr(generation, rule))]


def code(text: str) -> str:
    """Any text as a code span on one line, without secrets."""
    text = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def one_line(text: str) -> str:
    return " ".join(printable(redact(text)).split())

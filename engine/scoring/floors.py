"""The floors under a run's scores: what costs nothing and knows nothing, scored on the same rows with the same tokenizer.

Two of them: the first turns of the dialogue, and one sentence of the training summaries for every row. A model that is not
above both has not learnt to summarise, whatever its ROUGE looks like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.scoring import alike, rouge
from engine.scoring.baselines import lead_baseline
from engine.scoring.constant import best_constant
from engine.scoring.rouge import References

_MOST_TURNS = 3


def measure(
    summaries: Sequence[str], dialogues: Sequence[str], references: References, tokenizer: str
) -> dict[str, Any]:
    """The floors of a run: the best lead of 1 to 3 turns and the best constant, both picked on these rows, with their ROUGE.

    Returns {"lead": {"turns", "rouge1", ...}, "constant": {"text", "candidates", "picked_on_rows", "rouge1", ...}}; the
    bounds of the search among the training `summaries` are those of `best_constant`. Seconds, once a run.
    """
    leads = [_lead(dialogues, references, turns, tokenizer) for turns in range(1, _MOST_TURNS + 1)]
    best = best_constant(summaries, references, tokenizer)
    constant = {"text": best.text, "candidates": best.candidates, "picked_on_rows": best.rows}
    constant |= rouge.rouge([best.text] * len(references), references, tokenizer)
    return {"lead": max(leads, key=lambda lead: lead["rouge_mean"]), "constant": constant}


def measure_again(
    floors: Mapping[str, Any], dialogues: Sequence[str], references: References, tokenizer: str
) -> dict[str, Any]:
    """The same lead and the same sentence on other rows."""
    text = floors["constant"]["text"]
    constant = {"text": text} | rouge.rouge([text] * len(references), references, tokenizer)
    return {"lead": _lead(dialogues, references, floors["lead"]["turns"], tokenizer), "constant": constant}


def _lead(dialogues: Sequence[str], references: References, turns: int, tokenizer: str) -> dict[str, Any]:
    return {"turns": turns} | rouge.rouge([lead_baseline(text, turns) for text in dialogues], references, tokenizer)


def keys_of(floors: Mapping[str, Any]) -> dict[str, float]:
    """What stands in each evaluation's row, so that curves are drawn over their floors."""
    return {f"{name}_rouge_mean": floors[name]["rouge_mean"] for name in ("lead", "constant")}


def in_words(floors: Mapping[str, Any]) -> str:
    lead, constant = floors["lead"], floors["constant"]
    turns = "first turn" if lead["turns"] == 1 else f"first {lead['turns']} turns"
    scores = f"{lead['rouge_mean']:.2f} by the {turns}, {constant['rouge_mean']:.2f} by one sentence for all rows"
    return f"rouge_mean {scores} ({constant['rouge_tokenizer']})"


def alike_warning(rows: Sequence[Mapping[str, str]]) -> str | None:
    """What to say of predictions that are nearly all alike; None where they are not, or where the references are too."""
    found = alike.alike([row["prediction"] for row in rows])
    references = [row["reference"] for row in rows if row["reference"]]
    if found.share < alike.ALIKE_LIMIT or (references and alike.alike(references).share >= alike.ALIKE_LIMIT):
        return None
    what = f"nearly the same text: {found.text}" if found.text.strip() else "empty"
    return f"{found.share:.0%} of the {len(rows)} predictions are {what}"

"""BERTScore against the formula of the paper, written out token by token, on a tiny encoder with random weights."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from engine.scoring.bertscore import BertScore

PREDICTIONS = [tiny.TEXTS[5], tiny.TEXTS[6], "네", ""]
REFERENCES = [[tiny.TEXTS[5]], [tiny.TEXTS[7], tiny.TEXTS[5]], ["아니요, 다음 주 금요일입니다."], ["요약"]]


def by_hand(bert, prediction: str, reference: str, layer: int) -> float:
    """Each text alone, without batches or padding: R = mean over reference tokens of the best cosine, P the other way round."""
    sides = []
    for text in (prediction, reference):
        ids = bert.tokenizer(text)["input_ids"]
        with torch.no_grad():
            states = bert.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        sides.append((ids, [state.tolist() for state in states]))

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    def covered(mine, theirs):
        ids, vectors = mine
        best = [max(cosine(vector, other) for other in theirs[1]) for vector in vectors]
        kept = [score for token, score in zip(ids, best, strict=True) if token not in (frame_start, frame_end)]
        return sum(kept) / len(kept) if kept else 0.0

    frame_start, frame_end = bert.tokenizer.cls_token_id, bert.tokenizer.sep_token_id
    precision, recall = covered(sides[0], sides[1]), covered(sides[1], sides[0])
    return 200 * precision * recall / (precision + recall) if precision * recall else 0.0


@pytest.mark.parametrize("layer", [1, 2])
def test_it_is_the_papers_formula(layer, tmp_path):
    bert = BertScore(*tiny.bert(), layer, torch.device("cpu"))
    found = bert(PREDICTIONS, REFERENCES)
    expected = [
        max(by_hand(bert, prediction, text, layer) for text in row)
        for prediction, row in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[0] == pytest.approx(100, abs=1e-3) and found[3] == 0.0 and max(found[1:]) < 99.9


def test_batches_precision_and_length_change_nothing(monkeypatch):
    from engine.scoring import bertscore

    bert = BertScore(*tiny.bert(), 2, torch.device("cpu"))
    found = bert(PREDICTIONS, REFERENCES)
    monkeypatch.setattr(bertscore, "_BATCH", 1)
    with torch.autocast("cpu", torch.bfloat16):  # as an evaluation computes
        assert bert(PREDICTIONS, REFERENCES) == pytest.approx(found, abs=1e-3)
    assert bert([" ".join(tiny.TEXTS * 9)], [[tiny.TEXTS[0]]])[0] > 0  # cut where its positions end

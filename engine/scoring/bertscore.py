"""BERTScore (Zhang et al., 2020): each token's vector against the most similar one of the other text.

F1 of greedy matching by cosine similarity, without idf weights and without rescaling to a baseline. As in the authors'
program, the tokens that frame a text may be matched and do not count themselves, and of several references the best counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64  # texts


class BertScore:
    """A metric of predictions and references: F1 x 100 of each row.

    Args:
        model: an encoder; it rests on the CPU and goes to `device` while it scores.
        layer: whose vectors are compared, from 1 to the model's number of layers.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, layer: int, device: torch.device) -> None:
        self.model, self.tokenizer, self.layer, self.device = model.eval().float(), tokenizer, layer, device
        positions = getattr(model.config, "max_position_embeddings", 512) - 2  # RoBERTa's begin at two
        self.longest = min(tokenizer.model_max_length, positions)

    @torch.no_grad()
    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        texts = list(dict.fromkeys([*predictions, *(text for row in references for text in row)]))
        # In full precision, whatever an evaluation computes in.
        with torch.autocast(self.device.type, enabled=False):
            self.model.to(self.device)
            try:
                vectors = dict(zip(texts, self._vectors(texts), strict=True))
            finally:
                self.model.to("cpu")
            return [
                max(100 * f1(*vectors[prediction], *vectors[reference]) for reference in row)
                for prediction, row in zip(predictions, references, strict=True)
            ]

    def _vectors(self, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
        """Of each text its unit vectors (tokens, width), and which of its tokens count (tokens,)."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            batch = self.tokenizer(
                [texts[i] for i in places],
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            frame, mask = batch["special_tokens_mask"].bool(), batch["attention_mask"].bool()
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
            states = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer].cpu()
            states = nn.functional.normalize(states, dim=-1)
            for row, i in enumerate(places):
                found[i] = states[row][mask[row]], ~frame[row][mask[row]]
        return [found[i] for i in range(len(texts))]


def f1(a: Tensor, a_counts: Tensor, b: Tensor, b_counts: Tensor) -> float:
    """Of two texts: unit vectors (tokens, width), and which of them count. 0 where one has no token that does."""
    if not (a_counts.any() and b_counts.any()):
        return 0.0
    alike = a @ b.T
    precision, recall = alike.max(dim=1).values[a_counts].mean(), alike.max(dim=0).values[b_counts].mean()
    total = float(precision + recall)
    return 2 * float(precision * recall) / total if total else 0.0

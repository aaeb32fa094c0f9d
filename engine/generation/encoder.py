"""The encoder pass of one batch, in groups of similar length.

Shapes: B examples, S source tokens, D hidden.
"""

from __future__ import annotations

import torch

# Tokens per pass on a CPU: temporaries of a feed-forward layer stay below what the C library hands back to the system
# (32 MB), which costs more than the arithmetic. Elsewhere one pass is faster.
CPU_TOKENS_PER_PASS = 1024


def encode(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Encoder states `[B, S, D]`; zeros after the last real token of a row. input_ids, attention_mask: `[B, S]`.

    On a CPU, rows are grouped by length and cut to their group's longest, so that little padding is computed.
    """
    encoder = model.get_encoder()
    if input_ids.device.type != "cpu":
        return encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).last_hidden_state
    states = None
    for rows, width in _groups(source_lengths(attention_mask)):
        part = encoder(
            input_ids=input_ids[rows, :width], attention_mask=attention_mask[rows, :width], return_dict=True
        ).last_hidden_state
        if states is None:
            states = part.new_zeros(*input_ids.shape, part.shape[-1])
        states[rows, :width] = part
    return states


def source_lengths(mask: torch.Tensor) -> list[int]:
    """Place after the last real token of each row, `[B]`; the full width for a row without any."""
    width = mask.shape[1]
    places = torch.arange(1, width + 1, device=mask.device)
    lengths = torch.where(mask != 0, places, 0).amax(dim=1)
    return torch.where(lengths == 0, width, lengths).tolist()


def _groups(lengths: list[int]) -> list[tuple[list[int], int]]:
    """Rows by falling length, in groups of at most CPU_TOKENS_PER_PASS padded tokens, each with its width."""
    groups: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1][0]) + 1) * groups[-1][1] <= CPU_TOKENS_PER_PASS:
            groups[-1][0].append(row)
        else:
            groups.append(([row], lengths[row]))
    return groups

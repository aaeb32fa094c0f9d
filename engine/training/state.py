"""What the training loop passes around and counts: a window of data, what it did, and how far the run is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from engine.data.windows import ORDERS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Window:
    """One update's data on this rank; the counts and `ids` are of the rows of all ranks."""

    batches: list[dict[str, Tensor]]
    tokens: int  # supervised tokens: what the summed loss is divided by
    all_tokens: int  # of source and target, without padding: what tokens_per_second counts
    ids: list[str]
    cells: tuple[int, ...] = ()  # as all_tokens, with padding: of source and target, or of a causal LM's one row
    padding: tuple[int, ...] = ()  # how many of these are padding


@dataclass(frozen=True)
class Update:
    """What one window did. `loss` is per supervised token over all ranks; `applied` is False where the update was skipped."""

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool


@dataclass
class TrainerState:
    """Everything the loop counts, as plain numbers. What is missing here would be lost by a resume.

    A checkpoint keeps it as `EngineState.position`, beside the states of optimizer, schedule, scaler and random streams.
    """

    step: int = 0  # updates made
    epoch: int = 0  # of the next window
    window: int = 0  # index of the next window within its epoch
    row_order: int = ORDERS[-1]  # which of the sampler's orders of rows
    skipped_in_a_row: int = 0
    skipped: int = 0
    best_step: int | None = None
    best_value: float | None = None
    evaluations_without_gain: int = 0
    evaluated_step: int | None = None
    evaluated_value: float | None = None
    saved_step: int | None = None
    stop_reason: str | None = None
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    # Since the last row of the log
    interval_loss: float = 0.0
    interval_tokens: int = 0
    interval_all_tokens: int = 0
    interval_samples: int = 0
    interval_seconds: float = 0.0
    interval_source_cells: int = 0
    interval_source_padding: int = 0
    interval_target_cells: int = 0
    interval_target_padding: int = 0

    def advance(self, window: Window, update: Update, *, updates_per_epoch: int) -> None:
        """Count one window and move to the next one."""
        self.window += 1
        if self.window == updates_per_epoch:
            self.epoch, self.window = self.epoch + 1, 0
        if update.applied:
            self.step += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1

    @property
    def evaluation_share(self) -> float:
        """Of the time of all updates and evaluations."""
        return self.evaluation_seconds / max(self.train_seconds + self.evaluation_seconds, 1e-9)

    def count_cells(self, window: Window) -> None:
        for part, cells, padding in zip(("source", "target"), window.cells, window.padding, strict=False):
            setattr(self, f"interval_{part}_cells", getattr(self, f"interval_{part}_cells") + cells)
            setattr(self, f"interval_{part}_padding", getattr(self, f"interval_{part}_padding") + padding)

    def padding_shares(self) -> dict[str, float]:
        """Padding among the cells since the last row of the log; those of source and target too where they are apart."""
        padding = {"source": self.interval_source_padding, "target": self.interval_target_padding}
        cells = {"source": self.interval_source_cells, "target": self.interval_target_cells}
        shares = {"padding_share": sum(padding.values()) / max(1, sum(cells.values()))}
        if all(cells.values()):
            shares |= {f"{part}_padding_share": padding[part] / cells[part] for part in cells}
        return shares

    def with_best(self, best: Mapping[str, Any] | None) -> TrainerState:
        """The same place with the best evaluation that is still there and of today's scale; where it is gone, patience begins
        anew."""
        if best is not None:
            return replace(self, best_step=best["step"], best_value=best["value"])
        patience = self.evaluations_without_gain if self.best_step is None else 0
        return replace(self, best_step=None, best_value=None, evaluations_without_gain=patience)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; floats come back to the bit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainerState:
        """The inverse. Raises: TypeError for a name that is none of ours, ValueError for a value of another kind."""
        values = {"row_order": ORDERS[0]} | values  # checkpoints from before there was another
        state = cls(**{_FORMER_NAMES.get(name, name): value for name, value in values.items()})
        for field in fields(state):
            kind, value = field.type.split(" | "), getattr(state, field.name)
            if not (value is None and "None" in kind) and not _KINDS[kind[0]](value):
                raise ValueError(f"{field.name} is not {field.type}")
        if state.row_order not in ORDERS:
            raise ValueError(f"row_order {state.row_order} is not known to this version")
        return state


_KINDS: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int and value >= 0,
    "float": lambda value: type(value) in (int, float),
    "str": lambda value: isinstance(value, str),
}
_FORMER_NAMES = {"interval_cells": "interval_all_tokens"}  # checkpoints written under the old name still resume

"""Fine-tune Korean dialogue-summarisation models; see README.md. Importing this package loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.errors import EngineError
    from engine.prediction.predictor import Predictor
    from engine.recipe.load import load_recipe
    from engine.recipe.schema import Recipe

__version__ = "0.1.0"
_HOMES = {
    "EngineError": "engine.errors",
    "Predictor": "engine.prediction.predictor",
    "Recipe": "engine.recipe.schema",
    "load_recipe": "engine.recipe.load",
}
__all__ = ["EngineError", "Predictor", "Recipe", "__version__", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Names are imported when first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

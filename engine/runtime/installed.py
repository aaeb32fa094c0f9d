"""Functions of installed modules, by the name that a recipe gives them; the user has allowed that before."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.runtime.faults import blaming

log = logging.getLogger("engine.train")
_ROOT = Path(__file__).resolve().parents[2]
_INSTALL = "install it (pip install -e FOLDER), and start elsewhere than in its folder"


def installed(name: str) -> Callable[..., Any]:
    """The function that `module:function` names, from an installed module.

    What only happens to lie in the working directory, beside the engine or in a run folder is not taken, nor is the standard
    library, which holds no metric but many a function that does harm when it is given texts.

    Raises:
        EngineError: E2.86.
    """
    module, _, function = name.partition(":")
    top = module.partition(".")[0]
    spec = None if top in sys.stdlib_module_names else _installed_spec(top)
    if spec is None:
        raise EngineError("E2.86", f"{top} is no installed module", f"evaluation.extra_metrics: {name}", _INSTALL)
    first = importlib.util.find_spec(top)
    if _places(first) != _places(spec):
        what = f"{top} would be imported from {_places(first)}, which hides the installed one"
        raise EngineError(
            "E2.86", what, f"evaluation.extra_metrics: {name}", "start from another folder, or rename that one"
        )
    with blaming("E2.86", f"{name} cannot be imported", "evaluation.extra_metrics", "try it in Python first"):
        found = getattr(importlib.import_module(module), function)
    log.info("metric %s from %s", function, _places(spec))
    return found


def _installed_spec(top: str) -> ModuleSpec | None:
    """As the import system finds a module, but for places that nobody installed anything in."""
    accident = {Path.cwd(), _ROOT, _ROOT / "engine", _ROOT / "tools"}
    path = [entry for entry in sys.path if entry and Path(entry).resolve() not in accident]
    for finder in sys.meta_path:  # those of editable installs beside Python's own
        found = PathFinder.find_spec(top, path) if finder is PathFinder else finder.find_spec(top, None)
        if found is not None:
            return found
    return None


def _places(spec: ModuleSpec | None) -> str:
    if spec is None:
        return "nowhere"
    return spec.origin or os.pathsep.join(map(str, spec.submodule_search_locations or ())) or spec.name

"""One HTML file with everything in it, from a template that lies beside the tools."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from engine.errors import EngineError

FOLDER = Path(__file__).parent


def needed(module: str, extra: str, why: str = "the page") -> Any:
    """A module that an extra of setup.cfg brings. Raises: EngineError E2.78 where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        next = f"pip install -c constraints.txt -e '.[{extra}]'"
        raise EngineError("E2.78", f"{why} needs {error.name}", "", next, safe="nothing was written") from error


def fill(template: str, extra: str, **values: Any) -> str:
    """The text of a page; what `values` hold is escaped."""
    jinja2 = needed("jinja2", extra)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write(path: Path, text: str, safe: str) -> None:
    """Write the page and say where it is. Raises: EngineError E6.1 where the disk refuses; `safe` says what is untouched."""
    from engine.runtime.atomic import storage_error, write_text_atomically

    try:
        write_text_atomically(path, text, durable=False)
    except OSError as error:
        raise storage_error(error, path, "writing the page", safe, "") from error
    print(f"\npage: {path}")

"""The walkthrough: saved without traces of a machine, its cheap cells run here, and all of it in a kernel on a trained run."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

PATH = Path(__file__).resolve().parent.parent / "recipes" / "notebooks" / "walkthrough.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_saved_clean(notebook):
    nbformat.validate(notebook)
    assert len(cells(notebook)) >= 9 and all(cell.execution_count is None for cell in cells(notebook))
    saved = str([cell.outputs for cell in cells(notebook)])
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users|usr)/|site-packages|Traceback|stderr", saved)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    korean = sum(len(re.findall("[가-힣]", text)) for text in texts)
    assert korean > 1000
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(texts))
    assert links and all((PATH.parent / link).is_file() for link in links)


def test_the_cheap_cells_say_what_is_saved(notebook):
    """Those that need no model give the saved numbers again; what is read from the documents is found there."""
    pytest.importorskip("bitsandbytes")
    import pandas as pd

    from engine.recipe.shipped import RECIPES

    names = {"pd": pd, "RECIPES": RECIPES, "ROOT": RECIPES.parent}
    cheap = [cell for cell in cells(notebook) if "cheap" in cell.metadata.get("tags", [])]
    assert len(cheap) >= 4
    for cell in cheap:
        with redirect_stdout(StringIO()) as printed:
            exec(compile(cell.source, cell.id, "exec"), names)  # noqa: S102
        said = [output.text for output in cell.outputs if output.output_type == "stream"]
        assert printed.getvalue() == "".join(said)
    assert len(names["memory"]) >= 4 and "ROUGE" in printed.getvalue()


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook, trained, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("KODIALOGUE_RUN", str(trained[0] / "run"))
    monkeypatch.setenv("PYTHONPATH", str(PATH.parents[2]))
    folder = {"metadata": {"path": str(PATH.parent)}}
    nbclient.NotebookClient(notebook, timeout=170, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert "빔 4개의 이득" in str(outputs)

"""Code that a recipe names comes from where something was installed, and from nowhere else."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder

import pytest
from runs import LENGTH_ERROR

from engine.errors import EngineError
from engine.runtime.installed import installed


def test_code_that_only_lies_about_is_not_imported(tmp_path, site, monkeypatch):
    (tmp_path / "lying_about.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` and PYTHONPATH=. have it
    for name in ("lying_about:f", "subprocess:call", "os:system", "nowhere_at_all:f"):
        with pytest.raises(EngineError, match="E2.86.*no installed module"):
            installed(name)
    (site / "hidden.py").write_text(LENGTH_ERROR)
    assert installed("hidden:length_error")(["가나"], [["가"]]) == [1]
    del sys.modules["hidden"]
    (tmp_path / "hidden.py").write_text("raise SystemExit('imported')\n")
    importlib.invalidate_caches()
    with pytest.raises(EngineError, match="E2.86.*hidden would be imported from .*which hides the installed one"):
        installed("hidden:length_error")


def test_installed_code_that_cannot_be_imported_is_one_line(site):
    (site / "broken_metrics.py").write_text("import no_such_module_here\n")
    (site / "empty_metrics.py").write_text("")
    for name, reason in (("broken_metrics:f", "no_such_module_here"), ("empty_metrics:f", "no attribute 'f'")):
        with pytest.raises(EngineError, match=f"E2.86.*cannot be imported.*{reason}"):
            installed(name)


def test_import_hooks_of_editable_installs_are_asked(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "edited.py").write_text(LENGTH_ERROR)

    class Finder:
        @staticmethod
        def find_spec(name, path, target=None):
            return PathFinder.find_spec(name, [str(folder)]) if name == "edited" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert callable(installed("edited:length_error"))
    del sys.modules["edited"]

#!/usr/bin/env python3
"""Upload a finished model to the Hugging Face hub: its weights, tokenizer, settings, recipe and card, and nothing else.

    python tools/push_to_hub.py RUN --repo owner/name [--private] [--dry-run]
    python tools/push_to_hub.py RUN --to-folder DIR                           # the same files, to look at or to carry

RUN is a run folder, its final_model, or any model or adapter folder. Optimizer states, predictions and data never leave: files
of other kinds and subfolders stay behind and are listed. Pickled weights, links, and secrets in the recipe or another
settings file are refused. Log in with `hf auth login` first.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402

_SUFFIXES = {".safetensors", ".json", ".model", ".txt", ".jinja", ".md", ".yaml"}
_VOCABULARY = re.compile(r"tokenizer\.json|vocab.*|merges\.txt|added_tokens\.json")  # tokens, not settings
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SAFE = "nothing was uploaded"


def files_of(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that go and the names of what stays, in order.

    Raises: EngineError E4.3 for pickled weights, E4.4 for links, E2.133 for a secret.
    """
    from engine.checkpoints.manifest import PICKLES
    from engine.models import hub

    hub.check_folder(folder)
    go, stay = [], []
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise EngineError("E4.4", "a link, which may lead anywhere", str(path), "copy the file in", safe=_SAFE)
        if path.suffix in PICKLES:
            what, advice = "pickled weights, which may run code where they are loaded", "tools/convert_weights.py"
            raise EngineError("E4.3", what, str(path), advice, safe=_SAFE)
        wanted = path.is_file() and path.suffix in _SUFFIXES and not path.name.startswith(".")
        go.append(path) if wanted else stay.append(path.name)
    for path in go:
        if path.suffix != ".safetensors" and not _VOCABULARY.fullmatch(path.name) and holds_secret(path):
            advice = "remove it from that file, and revoke it"
            raise EngineError("E2.133", "a token or password stands in a file", str(path), advice, safe=_SAFE)
    return go, stay


def holds_secret(path: Path) -> bool:
    """Whether a settings file holds what `without_secrets` would take out: by the key's name, or by the look of the value."""
    from engine.errors import redact
    from engine.recipe import yaml_subset
    from engine.recipe.dump import without_secrets
    from engine.runtime.faults import blaming

    if path.suffix == ".model":
        return False  # a binary vocabulary
    with blaming("E4.9", "unreadable model file", path, "write the model again", safe=_SAFE):
        text = path.read_text(encoding="utf-8")
        values: Any = None
        if path.suffix == ".json":
            values = json.loads(text)
        elif path.name == "recipe.yaml":
            values = yaml_subset.parse(text).value
        return redact(text) != text or without_secrets(values) != values


def upload(files: Sequence[Path], repository: str, *, private: bool) -> str:
    """One commit; returns its address.

    Raises: EngineError E2.134 where the hub is switched off, E2.137 where `private` is asked for and the repository is public,
    E6.60 where it fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    from engine.runtime.faults import first_line

    if constants.HF_HUB_OFFLINE:
        what = "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, which forbids the network"
        raise EngineError("E2.134", what, repository, "unset it, or use --to-folder", safe=_SAFE)
    api = HfApi()
    operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=str(path)) for path in files]
    try:
        api.create_repo(repository, private=private, exist_ok=True)  # one that is there stays as public as it is
        if private and not api.repo_info(repository).private:
            advice = "make it private on its page on the hub, or name another"
            raise EngineError(
                "E2.137", "--private, but the repository is there and public", repository, advice, safe=_SAFE
            )
        return str(api.create_commit(repository, operations, commit_message="Upload the model").commit_url)
    except EngineError:
        raise
    except Exception as error:  # the client raises many unrelated types; each means that nothing was committed
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = "log in with `hf auth login`, with a token that may write" if status in (401, 403) else "try again"
        what = f"the hub did not take the model: {first_line(error)}"
        raise EngineError("E6.60", what, repository, advice, safe="no commit was made") from error


def copy(files: Sequence[Path], output: Path) -> None:
    """A folder stands in for the hub. Raises: EngineError E2.63 where it is there already."""
    from engine.runtime.atomic import new_folder

    with new_folder(output) as partial:
        for path in files:
            shutil.copyfile(path, partial / path.name, follow_symlinks=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="RUN", help="run folder, final_model, or model folder")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--repo", metavar="OWNER/NAME", help="repository on the hub; made where it is not there")
    where.add_argument("--to-folder", type=Path, metavar="DIR", help="a new folder instead of the hub")
    parser.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    parser.add_argument("--dry-run", action="store_true", help="list what would go, and stop")
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parser.parse_args(arguments)

    from engine.prediction.predictor import model_folder

    if options.repo is not None and not _REPOSITORY.fullmatch(options.repo):
        raise EngineError("E2.135", "not the name of a repository", options.repo, "write owner/name", safe=_SAFE)
    files, stay = files_of(model_folder(options.model))
    for path in files:
        print(f"{path.stat().st_size:>14,}  {path.name}")
    if stay:
        print(f"stays here: {', '.join(stay)}")
    if options.dry_run:
        print("dry run: nothing was uploaded or written")
    elif options.repo:
        print(upload(files, options.repo, private=options.private))
    else:
        copy(files, options.to_folder)
        print(options.to_folder)
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))

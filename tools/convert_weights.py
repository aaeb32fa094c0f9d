#!/usr/bin/env python3
"""Turn a model whose weights are pickle files (pytorch_model.bin) into a safetensors folder that recipes can name.

    python tools/convert_weights.py digit82/kobart-summarization models/kobart [--revision COMMIT]
    python engine/train.py recipes/kobart.yaml model.name_or_path=models/kobart

Training does the same by itself and keeps its copy in a cache (engine/models/pickled.py); this makes a folder to take along,
and loads it once to see that no weight is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402


def convert(source: str, output: Path, revision: str | None = None) -> Path:
    """Write `source` (folder or hub id) to `output` as safetensors, with its tokenizer and settings.

    Raises:
        EngineError: E2 for an output that is there already or a switch that makes pickle unsafe, E4 for a model that
            cannot be had or read, or whose configuration asks for code of its own.
    """
    import torch

    from engine.models import configuration, hub, pickled, weights
    from engine.recipe.schema import Model
    from engine.runtime.atomic import new_folder, refuse_existing

    refuse_existing(output)
    folder = hub.find(source, revision, allow_pickled=True)
    hub.check_pickled_folder(folder)
    with new_folder(output) as partial:
        pickled.write_copy(folder, partial)
        hub.check_folder(partial)
        config = configuration.load_config(Model(name_or_path=str(partial)), partial)
        with weights.quiet_transformers():
            weights.load_folder(partial, config, dtype="auto", device=torch.device("cpu"))
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="hub id or folder")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--revision", help="commit of the hub repository")
    options = parser.parse_args(arguments)
    try:
        folder = convert(options.source, options.output, options.revision)
    except EngineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))

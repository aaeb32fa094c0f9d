#!/usr/bin/env python3
"""Turn a model whose weights are pickle files (pytorch_model.bin) into a safetensors folder that recipes can name.

    python tools/convert_weights.py digit82/kobart-summarization models/kobart [--revision COMMIT]
    python engine/train.py recipes/kobart.yaml model.name_or_path=models/kobart

Training and prediction never open pickle files. This is the one place that does, on your explicit request, through torch's
restricted reader (`weights_only=True`): it builds tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402

NOTHING_WRITTEN = "nothing was written"
PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "pytorch_model*.bin"]
WEIGHTS = ("pytorch_model", "model.safetensors")  # beginnings of the names that are not copied
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's switch that opens pickle to code again


def convert(source: str, output: Path, revision: str | None = None) -> Path:
    """Write `source` (folder or hub id) to `output` as safetensors, with its tokenizer and settings.

    Raises:
        EngineError: E2 for an output that is there already or a switch that makes pickle unsafe, E4 for a model that
            cannot be had or read, or whose configuration asks for code of its own.
    """
    if os.environ.get(UNSAFE):
        raise EngineError(
            "E2.40", f"{UNSAFE} is set, which lets pickle files run code", "environment", safe=NOTHING_WRITTEN
        )
    if output.exists():
        raise EngineError(
            "E2.63", "the output is there already", str(output), "name a new folder", safe=NOTHING_WRITTEN
        )
    from engine.models import hub

    folder = Path(source) if Path(source).is_dir() else download(source, revision)
    hub.check_folder(folder, weights=False)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_weights(folder, partial)
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith(WEIGHTS) and any(file.match(rule) for rule in PATTERNS):
                shutil.copyfile(file, partial / file.name)
        hub.check_folder(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def download(name: str, revision: str | None) -> Path:
    """The model's files, pickle weights included, from the hub or its local cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS, ignore_patterns=["*/*"]))
    except Exception as error:  # the client raises many unrelated types; each means that the model cannot be had
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise EngineError(
            "E4.1", f"the model cannot be had: {line}", name, "check the name", safe=NOTHING_WRITTEN
        ) from error


def save_weights(folder: Path, output: Path) -> None:
    """Read by the restricted reader, in the precision they are stored in, and write safetensors; tied weights once."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    settings = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **settings)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, report = kind.from_pretrained(
            folder, dtype="auto", use_safetensors=False, weights_only=True, output_loading_info=True, **settings
        )
    except (
        Exception
    ) as error:  # pickle, torch and transformers raise what they like at a file they cannot or may not read
        line = next(iter(str(error).splitlines()), type(error).__name__)
        where = f"{folder}/pytorch_model*.bin"
        raise EngineError("E4.3", f"the weights cannot be read safely: {line}", where, safe=NOTHING_WRITTEN) from error
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise EngineError(
            "E4.8", f"the weights lack {names}", str(folder), "download the model again", safe=NOTHING_WRITTEN
        )
    model.save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
    sys.exit(main())

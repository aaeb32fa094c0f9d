#!/usr/bin/env python3
"""Write a finished model for another program, and hold it against the original before the folder gets its name.

    python tools/export.py RUN --format safetensors --output DIR                       # vLLM, transformers
    python tools/export.py RUN --format ctranslate2 --output DIR [--quantization int8] # CTranslate2 (extra `bench`)

safetensors: adapters are merged into their base; tokenizer, chat template, generation settings, recipe and card go along.
Its greedy tokens must equal the original's, each one. ctranslate2: the same model converted, with its tokenizer; the share of
greedy texts that equal the original's (in fp32, without penalties) is printed, and below --at-least nothing is written.
Samples are dialogues of the run's dev predictions, or of --dialogues FILE.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402

if TYPE_CHECKING:
    from engine.models.bundle import ModelBundle

FORMATS = ("safetensors", "ctranslate2")
QUANTIZATIONS = ("int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")
REPORT = "export_report.json"
_SAFE = "nothing was written"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def export(
    model: Path,
    output: Path,
    *,
    dialogues: Sequence[str],
    quantization: str | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    """Write `output` and return the report of the check.

    Args:
        model: folder of a model or an adapter.
        at_least: share of texts that a CTranslate2 model must have in common with the original; None: safetensors.

    Raises:
        EngineError: E2.63 for an output that is there already, E4 for a model that cannot be read, merged or converted,
            E4.70 where the result does not write what the original writes.
    """
    from engine.runtime.atomic import new_folder, write_json_atomically

    if at_least is not None:
        import pages

        pages.needed("ctranslate2", "bench", "CTranslate2 models")
    with new_folder(output) as partial:
        plain = partial / "plain"
        write_plain(model, plain)
        if at_least is None:
            report = check_plain(model, plain, dialogues)
        else:
            convert(plain, partial / "converted", quantization)
            report = check_converted(plain, partial / "converted", dialogues, at_least) | {"quantization": quantization}
            _move_up(partial / "converted", partial)
            for path in plain.glob("*.safetensors*"):
                path.unlink()
        _move_up(plain, partial)
        write_json_atomically(partial / REPORT, report)
    return report


def write_plain(model: Path, folder: Path) -> None:
    """A folder that needs no adapter: merged, or the model's own files."""
    import merge_adapter
    import push_to_hub

    from engine.models import hub

    if hub.is_adapter(model):
        merge_adapter.merge(model, folder)
    else:
        push_to_hub.copy(push_to_hub.files_of(model)[0], folder)


def _move_up(folder: Path, above: Path) -> None:
    """What is there already stays: CTranslate2 has a config.json of its own."""
    for path in folder.iterdir():
        if not (above / path.name).exists():
            path.rename(above / path.name)
    shutil.rmtree(folder)


def check_plain(model: Path, plain: Path, dialogues: Sequence[str]) -> dict[str, Any]:
    """The folder as any program loads it, against the original on its base in full precision.

    Raises: EngineError E4.70 for a single different token.
    """
    import torch
    from merge_adapter import difference, load_alone, outputs, stored_precision

    from engine.models import hub
    from engine.models.load import load_trained

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = stored_precision(model, None) if hub.is_adapter(model) else _precision(plain)
    original = load_trained(model, device=device, precision=precision, four_bit=False)
    expected = outputs(original.model, original, dialogues)
    alone = load_alone(plain, original, device)
    alone.generation_config = original.generation_config  # the weights are compared; both decode greedily
    found = difference(expected, outputs(alone, original, dialogues))
    report = {"format": "safetensors", "precision": precision, "dialogues": len(dialogues)} | found
    if report["equal_tokens"] < report["tokens"]:
        what = f"the exported model writes other tokens: {report['equal_tokens']} of {report['tokens']} are equal"
        advice = "merge with tools/merge_adapter.py --precision fp32, and export what it writes"
        raise EngineError("E4.70", what, f"{len(dialogues)} dialogues, {precision}", advice, safe=_SAFE)
    return report


def _precision(folder: Path) -> str:
    from engine.models import hub

    kinds = hub.stored_types(folder)
    return {"BF16": "bf16", "F16": "fp16"}.get(max(kinds, key=kinds.get, default="F32"), "fp32")


def convert(plain: Path, output: Path, quantization: str | None) -> None:
    """CTranslate2's own converter. Raises: EngineError E4.71 for a class that it does not know, or another reason of its."""
    from ctranslate2.converters import TransformersConverter

    from engine.runtime.atomic import read_json, write_json_atomically
    from engine.runtime.faults import blaming

    config = read_json(plain / "config.json")
    if (
        config.get("model_type") == "bart"
    ):  # an old name that the converter asks for; transformers' Bart has no other order
        write_json_atomically(plain / "config.json", {"normalize_before": False} | config)
    advice = "export --format safetensors"
    with blaming("E4.71", "CTranslate2 cannot convert this model", plain, advice, safe=_SAFE):
        TransformersConverter(str(plain)).convert(str(output), quantization=quantization)


def check_converted(plain: Path, converted: Path, dialogues: Sequence[str], at_least: float) -> dict[str, Any]:
    """Greedy texts of both. Raises: EngineError E4.70 where fewer than `at_least` of them are equal."""
    import torch
    from merge_adapter import outputs
    from transformers import GenerationConfig

    from engine.models.load import load_trained

    bundle = load_trained(plain, device=torch.device("cpu"), precision="fp32")
    own = bundle.model.generation_config
    bundle.model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in _IDS})
    expected = [ids for _, ids in outputs(bundle.model, bundle, dialogues)]
    decode = bundle.text_encoder().decode
    texts, others = ([decode(ids) for ids in rows] for rows in (expected, converted_ids(converted, bundle, dialogues)))
    equal = sum(one == other for one, other in zip(texts, others, strict=True))
    report = {"format": "ctranslate2", "dialogues": len(texts), "equal_texts": equal}
    if equal < at_least * len(texts):
        what = f"the converted model writes other texts: {equal} of {len(texts)} are equal, fewer than {at_least:.0%}"
        advice = "convert without --quantization, or lower --at-least and compare the scores of both on your dev set"
        raise EngineError("E4.70", what, f"{len(texts)} dialogues", advice, safe=_SAFE)
    return report


def converted_ids(folder: Path, bundle: ModelBundle, dialogues: Sequence[str]) -> list[list[int]]:
    """Greedy token ids by CTranslate2, from the prompts of the original."""
    import ctranslate2
    from merge_adapter import GREEDY_TOKENS

    from engine.prediction.files import examples_of

    encoder, tokenizer = bundle.text_encoder(), bundle.tokenizer
    features = [encoder.prompt_feature(example, row) for row, example in enumerate(examples_of(list(dialogues), None))]
    prompts = [tokenizer.convert_ids_to_tokens(feature.input_ids) for feature in features]
    ends = bundle.generation_config.eos_token_id
    end = {"end_token": tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])}
    if bundle.family == "causal":
        found = ctranslate2.Generator(str(folder)).generate_batch(
            prompts, beam_size=1, max_length=GREEDY_TOKENS, include_prompt_in_result=False, **end
        )
        return [list(result.sequences_ids[0]) for result in found]
    found = ctranslate2.Translator(str(folder)).translate_batch(
        prompts, beam_size=1, max_decoding_length=GREEDY_TOKENS, **end
    )
    return [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in found]


def samples(model: Path, file: Path | None, count: int) -> list[str]:
    """Dialogues to compare on: of a file, else of the run's dev predictions, else three that lie in this repository.

    Raises: EngineError E3 for a file without dialogues.
    """
    from merge_adapter import DIALOGUES

    from engine.data.files import read_table
    from engine.prediction.predictor import recipe_of

    column = "dialogue"
    if file is None:
        file = next(iter(sorted((model.parent / "predictions").glob("dev-step*.csv"))), None)
    else:
        column = recipe_of(model).data.text_column
    if file is None:
        return list(DIALOGUES)
    records = read_table(file, columns=[column]).records[:count]
    texts = [text for record in records if isinstance(text := record.values.get(column), str) and text.strip()]
    if not texts:
        raise EngineError("E3.63", f"no dialogues in a column {column!r}", str(file), "name another file", safe=_SAFE)
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="RUN", help="run folder, final_model, or model folder")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what the other program reads")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of CTranslate2's weights (default: as they are)")
    parser.add_argument("--dialogues", type=Path, metavar="FILE", help="CSV, JSONL or parquet to compare on")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="how many dialogues (default: 8)")
    parser.add_argument("--at-least", type=float, default=0.9, metavar="SHARE", help="equal texts (default: 0.9)")
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parser.parse_args(arguments)
    to_ctranslate2 = options.format == "ctranslate2"
    if options.quantization and not to_ctranslate2:
        parser.error("--quantization goes with --format ctranslate2")
    if options.samples < 1 or not 0 <= options.at_least <= 1:
        parser.error("--samples is 1 or more, --at-least from 0 to 1")

    from engine.prediction.predictor import model_folder
    from engine.runtime.atomic import refuse_existing

    refuse_existing(options.output)
    model = model_folder(options.model)
    dialogues = samples(model, options.dialogues, options.samples)
    at_least = options.at_least if to_ctranslate2 else None
    report = export(model, options.output, dialogues=dialogues, quantization=options.quantization, at_least=at_least)
    if to_ctranslate2:
        compared = f"{report['equal_texts']} of {report['dialogues']} greedy texts equal the original's"
    else:
        compared = f"{report['equal_tokens']} of {report['tokens']} greedy tokens equal the original's"
    print(f"{options.output}: {options.format}; on {report['dialogues']} dialogues {compared}")
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))

#!/usr/bin/env python3
"""Merge a LoRA adapter into its base, in the base's original precision, and check the result against the adapter.

    python tools/merge_adapter.py RUN/final_model merged/ [--base NAME_OR_FOLDER]

An adapter trained on a 4-bit base is merged into the base's full weights, never into the rounded ones. The merged model
must give the adapter's logits and greedy text on a few dialogues, and must load alone with Hugging Face's classes and give
them again; only then does the folder get its name.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.models.bundle import ModelBundle

NOTHING_WRITTEN = "nothing was written"
DIALOGUES = (
    "#Person1#: 내일 회의가 몇 시였죠?\n#Person2#: 오후 두 시예요. 자료는 제가 가져갈게요.\n"
    "#Person1#: 그럼 저는 회의실을 예약할게요.",
    "#Person1#: 감기에 걸린 것 같아요.\n#Person2#: 언제부터 아프셨어요?\n#Person1#: 어제 저녁부터요. 열도 조금 있어요.",
    "#Person1#: 이 신발을 바꿀 수 있을까요?\n#Person2#: 영수증이 있으면 일주일 안에 바꿔 드려요.",
)
GREEDY_TOKENS = 32
# Largest accepted difference of logits, in standard deviations of the logits. In 16 bits the merged weights are rounded
# once more than base and adapter apart, and a sum over thousands of inputs shows it.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.05}


def merge(adapter: Path, output: Path, base: str | None = None, precision: str = "auto") -> dict[str, Any]:
    """Write the merged model to `output` and return the report of the checks.

    Args:
        base: replaces the base that the adapter names.
        precision: of the merged weights; auto: as the base is stored.

    Raises:
        EngineError: E2 for an output that is there already, E4 where the folder is no adapter, the base is missing or
            another one, or the merged model does not do what the adapter does.
    """
    import torch

    from engine.models import hub
    from engine.models.bundle import save_model
    from engine.models.load import load_trained
    from engine.prediction import export
    from engine.prediction.card import card
    from engine.prediction.predictor import recipe_of
    from engine.runtime.atomic import new_folder, refuse_existing

    refuse_existing(output)
    if not hub.is_adapter(adapter):
        raise EngineError(
            "E4.64", "no adapter (adapter_config.json) here", str(adapter), "check the path", safe=NOTHING_WRITTEN
        )
    stored = stored_precision(adapter, base) if precision == "auto" else precision
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bundle = load_trained(adapter, device=device, precision=stored, base=base, four_bit=False)
    expected = outputs(bundle.model, bundle)
    bundle.model = bundle.model.merge_and_unload()
    report = {"precision": stored, **compare(expected, outputs(bundle.model, bundle), stored, "merged")}
    if hub.base_record(adapter).get("quantization"):
        # What evaluation saw during training: its base was rounded to 4 bits, so some difference is to be expected.
        rounded = load_trained(adapter, device=device, precision=stored, base=base)
        report["four_bit"] = difference(outputs(rounded.model, rounded), outputs(bundle.model, bundle))
        del rounded

    with new_folder(output) as partial:
        save_model(bundle, partial)
        copy_recipe(adapter, partial)
        alone = load_alone(partial, bundle, device)
        report["reloaded"] = compare(outputs(bundle.model, bundle), outputs(alone, bundle), stored, "reloaded")
        recipe = recipe_of(adapter)
        export.write_generation_config(partial, bundle, recipe.generation)  # after the checks, which decode greedily
        (partial / "README.md").write_text(card(recipe, bundle), encoding="utf-8")
        (partial / "merge_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def stored_precision(adapter: Path, base: str | None) -> str:
    """The type of most of the base's weights, as its files have them."""
    from engine.models import hub

    kinds = hub.stored_types(hub.resolve_base(adapter, base).folder)
    names = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
    return names.get(max(kinds, key=kinds.get, default="F32"), "fp32")


def outputs(
    model: nn.Module, bundle: ModelBundle, dialogues: Sequence[str] = DIALOGUES
) -> list[tuple[Tensor, list[int]]]:
    """For each dialogue: logits along the greedy continuation (T, V), and its token ids."""
    import torch

    from engine.data.rows import Example

    encoder, found = bundle.text_encoder(), []
    device = model.get_input_embeddings().weight.device
    for row, dialogue in enumerate(dialogues):
        feature = encoder.prompt_feature(Example(str(row), dialogue, (), None, row + 1), row)
        ids = torch.tensor([feature.input_ids], device=device)
        with torch.no_grad():
            text = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=1,
                do_sample=False,
                max_new_tokens=GREEDY_TOKENS,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.cat([step.float() for step in text.logits]).cpu()
        found.append((logits, text.sequences[0, -len(text.logits) :].tolist()))
    return found


def compare(
    expected: list[tuple[Tensor, list[int]]], found: list[tuple[Tensor, list[int]]], precision: str, name: str
) -> dict[str, float]:
    """The difference of two models' outputs, if it is small enough.

    Raises:
        EngineError: E4.14 beyond the tolerance; in fp32 also for a single different token.
    """
    result, limit = difference(expected, found), TOLERANCE[precision]
    worst, equal, total = result["logit_difference"], result["equal_tokens"], result["tokens"]
    if not worst <= limit or (precision == "fp32" and equal < total):
        raise EngineError(
            "E4.14",
            f"the {name} model differs from the adapter: logits by {worst:.2g} standard deviations (limit {limit:g}), "
            f"{equal} of {total} greedy tokens equal",
            f"{len(DIALOGUES)} dialogues, {precision}",
            "use the adapter unmerged, or merge with --precision fp32",
            safe=NOTHING_WRITTEN,
        )
    return result


def difference(expected: list[tuple[Tensor, list[int]]], found: list[tuple[Tensor, list[int]]]) -> dict[str, float]:
    """Largest difference of logits, in their standard deviations, up to the first different token; equal greedy tokens."""
    worst, equal, total = 0.0, 0, 0
    for (logits, ids), (other_logits, other_ids) in zip(expected, found, strict=True):
        pairs = list(zip(ids, other_ids, strict=False))
        agreed = next((at for at, (one, two) in enumerate(pairs) if one != two), len(pairs))
        steps = min(agreed + 1, len(pairs))  # the logits that chose the first different token still had equal inputs
        gap = (logits[:steps] - other_logits[:steps]).abs().max() / logits[:steps].std()
        worst = max(worst, float(gap))
        equal, total = equal + agreed, total + max(len(ids), len(other_ids))
    return {"logit_difference": worst, "equal_tokens": equal, "tokens": total}


def load_alone(folder: Path, bundle: ModelBundle, device: Any) -> nn.Module:
    """The merged folder as any program without this package would load it."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from engine.models.weights import quiet_transformers

    auto = AutoModelForCausalLM if bundle.family == "causal" else AutoModelForSeq2SeqLM
    with quiet_transformers():
        model = auto.from_pretrained(folder, dtype="auto", use_safetensors=True, trust_remote_code=False)
    return model.to(device).eval()


def copy_recipe(adapter: Path, folder: Path) -> None:
    """The recipe goes along: generation settings are in it."""
    for place in (adapter, adapter.parent):
        if (place / "recipe.yaml").is_file():
            shutil.copyfile(place / "recipe.yaml", folder / "recipe.yaml")
            return


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="run folder or adapter folder")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--base", help="base model, where it is not the one that the adapter names")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of the result")
    options = parser.parse_args(arguments)
    try:
        from engine.prediction.predictor import model_folder

        report = merge(model_folder(options.adapter), options.output, options.base, options.precision)
    except EngineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(
        f"{options.output}: merged in {report['precision']}; logits differ by at most {report['logit_difference']:.1e} "
        f"standard deviations, {report['equal_tokens']} of {report['tokens']} greedy tokens equal"
    )
    if (rounded := report.get("four_bit")) is not None:
        print(
            f"  against the adapter on its 4-bit base, as it was evaluated in training: logits differ by up to "
            f"{rounded['logit_difference']:.1e}, {rounded['equal_tokens']} of {rounded['tokens']} greedy tokens equal"
        )
        print(
            "  (few equal tokens are no fault of the merge: it goes to the base as it was before the rounding to 4 bits,\n"
            "  and after the first different token a text goes on differently; compare the scores of both on your dev set)"
        )
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))

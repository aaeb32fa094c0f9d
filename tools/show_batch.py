#!/usr/bin/env python3
"""Show what a recipe really trains on: its first training examples with the supervised tokens marked. No model is built.

    python tools/show_batch.py recipes/quickstart.yaml [section.key=value ...] [--rows 3] [--ids]

Between 【 and 】 stands what the loss sees; everything else is only read. ‹…› are special tokens.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs without the package installed

if TYPE_CHECKING:
    from engine.data.encode import Feature, TextEncoder
    from engine.data.rows import Example
    from engine.recipe.schema import Recipe


def text_encoder(recipe: Recipe) -> tuple[TextEncoder, Any]:
    """The encoder that training would use, and the model's configuration."""
    from engine.data.encode import TextEncoder
    from engine.data.prompts import PromptSettings
    from engine.models import configuration, hub, tokenization

    name = recipe.model.name_or_path
    rules = {"trust_remote_code": recipe.model.trust_remote_code, "weights": False}
    folder = hub.resolve(name, revision=recipe.model.revision, **rules) if name else None
    config = configuration.load_config(recipe.model, folder)
    family = configuration.family(recipe.model.family, config)
    tokenizer = tokenization.for_recipe(recipe, folder, family)
    tokenizer = tokenization.prepare(tokenizer, recipe.tokenizer.added_tokens, name=name or "trained here")
    encoder = TextEncoder(
        tokenizer=tokenizer,
        family=family,
        settings=PromptSettings(**recipe.prompt.model_dump()),
        max_source_length=recipe.data.max_source_length,
        max_target_length=recipe.data.max_target_length,
    )
    return encoder, config


def training_examples(recipe: Recipe) -> list[Example]:
    from engine.data.rows import read_examples

    settings = recipe.data
    return read_examples(settings.train_file, settings, require_summary=True, limit=settings.max_train_samples)


def text_of(encoder: TextEncoder, ids: list[int]) -> str:
    """Token ids as text, special tokens in ‹›, so that a missing or doubled one is seen."""
    tokenizer, special = encoder.tokenizer, set(encoder.tokenizer.all_special_ids)
    parts: list[str] = []
    run: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in special:
            run.append(token)
            continue
        if run:
            parts.append(tokenizer.decode(run, clean_up_tokenization_spaces=False))
            run = []
        if token is not None:
            parts.append(f"‹{tokenizer.convert_ids_to_tokens(token)}›")
    return "".join(parts)


def show(encoder: TextEncoder, feature: Feature, *, ids: bool) -> str:
    """One feature: an encoder-decoder's source and target, or a causal LM's one row, with the supervised span marked."""
    from engine.data.collate import IGNORE_INDEX

    target = [label for label in feature.labels if label != IGNORE_INDEX]
    source = feature.input_ids if encoder.family == "seq2seq" else feature.input_ids[: -len(target)]
    text = f"{text_of(encoder, source)}【{text_of(encoder, target)}】"
    return f"{text}\n  source {source}\n  target {target}" if ids else text


def heading(encoder: TextEncoder, feature: Feature, example: Example) -> str:
    cut = [
        f"{name} cut from {tokens} to {limit} tokens"
        for name, tokens, limit in (
            ("source", feature.source_tokens, encoder.max_source_length),
            ("target", feature.target_tokens, encoder.max_target_length),
        )
        if tokens > limit
    ]
    counts = f"source {feature.source_tokens}, target {feature.target_tokens} tokens"
    return f"--- {example.place}: {'; '.join(cut) or counts}"


def first_batch(recipe: Recipe, encoder: TextEncoder, config: Any, features: list[Feature]) -> list[str]:
    """Shapes of the first micro-batch on one device, and how much of it is padding."""
    from engine.data import collate
    from engine.training.batch_size import plan_line, window_sampler

    sampler = window_sampler(recipe, features)
    rows = [features[row] for row in sampler.window(0, 0)[0]]
    pad = encoder.tokenizer.pad_token_id
    if encoder.family == "causal":
        batch = collate.collate_causal(rows, pad_token_id=pad)
    else:
        start = getattr(config, "decoder_start_token_id", None)
        batch = collate.collate_seq2seq(rows, pad_token_id=pad, decoder_start_token_id=pad if start is None else start)
    padding = 1 - batch["attention_mask"].float().mean().item()
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
    told = [f"first micro-batch: {shapes}", f"padding in its input_ids: {100 * padding:.1f} %"]
    return [*told, f"on one device, {plan_line(sampler)}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="a file, or a name: kobart")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win")
    parser.add_argument("--rows", type=int, default=3, help="how many examples (default 3)")
    parser.add_argument("--ids", action="store_true", help="print token ids as well")
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    from engine.data.encode import encode_all, length_report
    from engine.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    examples = training_examples(recipe)
    encoder, config = text_encoder(recipe)
    features = encode_all(encoder, examples, augment=recipe.data.instruction_augmentation)
    for feature in features[: max(0, options.rows)]:
        print(heading(encoder, feature, examples[feature.index]), show(encoder, feature, ids=options.ids), "", sep="\n")
    print(
        f"{len(examples)} rows, {len(features)} training examples", length_report(features, encoder)["text"], sep="\n"
    )
    print(*first_batch(recipe, encoder, config, features), sep="\n")
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))

"""Rules between the sections of a recipe: combinations that would fail late, or quietly do something else than asked.

Each rule yields the keys it looked at, separated by spaces, and one line that says what is wrong with the first of them
and what to write instead. Rules see a recipe whose single values are all valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from engine import families, prompt_template
from engine.recipe.schema import Recipe

Finding = tuple[str, str]
COMMIT = re.compile(r"[0-9a-f]{40}\Z")
T5_NAME = re.compile(r"t5(?![a-z])|\bul2\b", re.IGNORECASE)
# A config may name code to be loaded; a recipe may not.
CODE_IN_CONFIG = {"auto_map", "auto_class", "custom_generate", "trust_remote_code", "quantization_config"}
PATHS = (
    "experiment.output_root",
    "experiment.output_dir",
    "data.train_file",
    "data.validation_file",
    "data.test_file",
    "evaluation.bertscore_model",
)


def is_t5(recipe: Recipe) -> bool:
    """Whether name or config say T5, whose activations leave the range of fp16."""
    model_type = (recipe.model.config or {}).get("model_type")
    return not families.of(model_type).fits_fp16 or bool(T5_NAME.search(recipe.model.name_or_path or ""))


def is_seq2seq(recipe: Recipe) -> bool:
    """Whether family, config or name say encoder-decoder; engine/models knows better once the config is read."""
    if recipe.model.family != "auto":
        return recipe.model.family == "seq2seq"
    model_type = (recipe.model.config or {}).get("model_type")
    if model_type is not None:
        return families.of(model_type).kind == "seq2seq"
    return is_t5(recipe) or "bart" in (recipe.model.name_or_path or "").lower()


def set_later(recipe: Recipe, key: str, than: str) -> bool:
    """Whether `key` was set above the layer that decided `than`, or on the command line: asked for, but without effect.

    Within one file it may be a leftover, as in every resolved recipe, which names all keys.
    """
    return recipe.layer(key) > recipe.layer(than) or recipe.origin(key) == "command line"


def check_model(recipe: Recipe) -> Iterator[Finding]:
    model, name, config = recipe.model, recipe.model.name_or_path, recipe.model.config or {}
    if model.init == "pretrained" and not name:
        yield "model.name_or_path model.init", "is missing; write a hub id or a folder"
    if name and ("://" in name or name != name.strip()):
        yield "model.name_or_path", "is not a hub id or a local folder"
    if model.init == "random" and not name and "model_type" not in config:
        yield "model.init model.config model.name_or_path", "is random, which needs model.config with a model_type"
    trains_tokenizer = model.init == "random" and not name and not recipe.tokenizer.name_or_path
    if trains_tokenizer and not recipe.tokenizer.train_vocab_size:
        keys = "model.init model.name_or_path tokenizer.name_or_path tokenizer.train_vocab_size"
        yield keys, "is random without a tokenizer; set tokenizer.train_vocab_size or tokenizer.name_or_path"
    if model.trust_remote_code and not COMMIT.match(model.revision or ""):
        yield "model.trust_remote_code model.revision", "needs model.revision as a full commit of 40 hex digits"
    for key in sorted(config):
        if key in CODE_IN_CONFIG or key.startswith("_"):
            yield f"model.config.{key}", "is refused: a recipe chooses no code and no private settings"


def check_adapters(recipe: Recipe) -> Iterator[Finding]:
    lora, four_bit = recipe.lora, recipe.quantization.load_in_4bit
    if four_bit and lora.enabled is False:
        yield "quantization.load_in_4bit lora.enabled", "needs adapters to train; drop lora.enabled: false"
    adapters = lora.enabled or (lora.enabled is None and four_bit)
    for key in ("use_rslora", "use_dora", "loraplus_lr_ratio", "modules_to_save"):
        if getattr(lora, key) and not adapters:
            keys = f"lora.{key} lora.enabled quantization.load_in_4bit"
            yield keys, "has no effect while no adapter is trained; set lora.enabled: true"


def check_training(recipe: Recipe) -> Iterator[Finding]:
    training, on_cpu = recipe.training, recipe.runtime.device == "cpu"
    if training.precision == "fp16" and is_t5(recipe):
        keys = "training.precision model.name_or_path model.config"
        yield keys, "is fp16, in which T5 models overflow; use bf16, fp32 or auto"
    if training.precision == "fp16" and on_cpu and not recipe.runtime.emulate_fp16_on_cpu:
        keys = "training.precision runtime.device runtime.emulate_fp16_on_cpu"
        yield keys, "is fp16, which CPUs run as fp32; use bf16 or fp32"
    if training.optim.startswith("paged") and on_cpu:
        yield "training.optim runtime.device", f"is {training.optim}, which needs CUDA; use adamw or adamw_8bit"
    if training.learning_rate > 1e30:
        yield "training.learning_rate", f"is {training.learning_rate:g}, beyond the float32 that optimizers compute in"
    warm_up = training.warmup_ratio if training.warmup_steps is None else training.warmup_steps
    if training.lr_scheduler_type == "constant" and warm_up:
        keys = "training.lr_scheduler_type training.warmup_steps training.warmup_ratio"
        yield keys, "is constant, which has no warm-up; use constant_with_warmup, or warmup_ratio: 0"


def check_data(recipe: Recipe) -> Iterator[Finding]:
    data, added = recipe.data, recipe.tokenizer.added_tokens
    if not data.train_file:
        yield "data.train_file", "is missing"
    if recipe.evaluation.strategy != "no" and not data.validation_file:
        keys = "data.validation_file evaluation.strategy"
        yield keys, "is missing; name a file, or set evaluation.strategy: no"
    if (
        data.tokens_per_batch
        and data.batching != "tokens"
        and set_later(recipe, "data.tokens_per_batch", "data.batching")
    ):
        keys = "data.tokens_per_batch data.batching"
        yield keys, f"has no effect while data.batching is {data.batching}; set it to tokens"
    if data.batching == "tokens" and recipe.training.auto_batch_size:
        keys = "training.auto_batch_size data.batching"
        yield keys, "tries numbers of rows, and data.batching is tokens; lower data.tokens_per_batch instead"
    if data.on_bad_row == "skip" and not data.max_bad_rows:
        yield "data.on_bad_row data.max_bad_rows", "is skip, which needs a cap: set data.max_bad_rows"
    summaries = [data.summary_column] if isinstance(data.summary_column, str) else data.summary_column
    columns = [data.text_column, *summaries, data.id_column, data.topic_column]
    named = [column for column in columns if column is not None]
    if not summaries or not all(named) or len(set(named)) < len(named):
        keys = "data.summary_column data.text_column data.id_column data.topic_column"
        yield keys, "and the other columns need names, each its own"
    if not all(token.strip() for token in added) or len(set(added)) < len(added):
        yield "tokenizer.added_tokens", "must not hold an empty or repeated token"


def check_prompt(recipe: Recipe) -> Iterator[Finding]:
    style = recipe.prompt.style
    if style == "chat" and is_seq2seq(recipe):
        keys = "prompt.style model.family model.name_or_path model.config"
        yield keys, "is chat, for which encoder-decoders have no template; use plain or instruction"
    if recipe.data.instruction_augmentation and style == "plain":
        keys = "data.instruction_augmentation prompt.style"
        yield keys, "needs instructions; set prompt.style: instruction or chat"
    template = recipe.prompt.template
    if style == "template":
        yield from _check_template(recipe)
    elif template is not None and set_later(recipe, "prompt.template", "prompt.style"):
        yield "prompt.template prompt.style", f"has no effect while prompt.style is {style}; set it to template"
    if recipe.prompt.prefix and style != "plain":
        yield "prompt.prefix prompt.style", f"belongs to the plain style, and prompt.style is {style}"


def _check_template(recipe: Recipe) -> Iterator[Finding]:
    template = recipe.prompt.template
    if fault := prompt_template.fault_of(template):
        yield "prompt.template prompt.style", fault
        return
    names = prompt_template.names_in(template)
    if "topic" in names and recipe.data.topic_column is None:
        yield "prompt.template data.topic_column", "names {topic}; set data.topic_column, or leave it out"
    if "topic" not in names and set_later(recipe, "data.topic_column", "prompt.template"):
        yield "data.topic_column prompt.template", "has no effect: prompt.template does not name {topic}"
    if recipe.data.instruction_augmentation and "instruction" not in names:
        keys = "data.instruction_augmentation prompt.template"
        yield keys, "has no effect: prompt.template does not name {instruction}"


def check_evaluation(recipe: Recipe) -> Iterator[Finding]:
    evaluation, off = recipe.evaluation, recipe.evaluation.strategy == "no"
    if not off and evaluation.metric != "loss" and not evaluation.generate:
        keys = "evaluation.metric evaluation.generate"
        yield keys, f"is {evaluation.metric}, which generate: false does not produce; use loss, or generate: true"
    yield from _check_extra_metrics(recipe)
    # Only where the metric was asked for after evaluation was switched off: with its default value nothing was asked.
    if off and set_later(recipe, "evaluation.metric", "evaluation.strategy"):
        yield "evaluation.metric evaluation.strategy", "chooses nothing while evaluation.strategy is no"
    if off and recipe.training.early_stopping_patience:
        keys = "training.early_stopping_patience evaluation.strategy"
        yield keys, "needs evaluations, and evaluation.strategy is no"
    for name in ("evaluation", "checkpoint"):
        section, keys = getattr(recipe, name), (f"{name}.steps", f"{name}.strategy")
        if section.strategy == "steps" and not section.steps:
            yield " ".join(reversed(keys)), f"is steps, which needs {name}.steps"
        if section.strategy != "steps" and section.steps and set_later(recipe, *keys):
            yield " ".join(keys), f"has no effect while {name}.strategy is {section.strategy}; set it to steps"


def _check_extra_metrics(recipe: Recipe) -> Iterator[Finding]:
    evaluation = recipe.evaluation
    names = [name.rpartition(":")[2] for name in evaluation.extra_metrics]
    if len(set(names)) < len(names):
        yield "evaluation.extra_metrics", "names two metrics alike"
    if names and not evaluation.generate and set_later(recipe, "evaluation.extra_metrics", "evaluation.generate"):
        yield "evaluation.extra_metrics evaluation.generate", "has no effect with generate: false"
    if "bertscore" in evaluation.extra_metrics and not evaluation.bertscore_model:
        yield "evaluation.bertscore_model evaluation.extra_metrics", "is missing; name the folder of an encoder"
    if evaluation.metric.endswith(":bertscore") and "bertscore" not in names:
        yield "evaluation.metric evaluation.extra_metrics", "is bertscore; add it to evaluation.extra_metrics"
    for key in ("bertscore_model", "bertscore_layer"):
        set_here = set_later(recipe, f"evaluation.{key}", "evaluation.extra_metrics")
        if getattr(evaluation, key) and "bertscore" not in evaluation.extra_metrics and set_here:
            yield f"evaluation.{key} evaluation.extra_metrics", "has no effect without bertscore in extra_metrics"


def check_generation(recipe: Recipe) -> Iterator[Finding]:
    gen = recipe.generation
    most = gen.max_new_tokens or (recipe.data.max_target_length if gen.max_length is None else None)
    lengths = "generation.max_length generation.max_new_tokens data.max_target_length"
    if most is not None and (gen.min_new_tokens or 0) > most:
        yield f"generation.min_new_tokens {lengths}", f"is {gen.min_new_tokens}, above the most new tokens, {most}"
    if gen.max_length and not gen.max_new_tokens and (gen.min_length or 0) > gen.max_length:
        yield f"generation.min_length {lengths}", f"is {gen.min_length}, above generation.max_length, {gen.max_length}"
    if gen.num_return_sequences > gen.num_beams and not gen.do_sample:
        keys = "generation.num_return_sequences generation.num_beams generation.do_sample"
        yield keys, f"is {gen.num_return_sequences}, above generation.num_beams, {gen.num_beams}"
    if gen.block_scripts and gen.allow_scripts is not None:
        yield "generation.block_scripts generation.allow_scripts", "and generation.allow_scripts exclude each other"
    if gen.allow_scripts == []:
        yield "generation.allow_scripts", "allows nothing; name scripts, or null for all"
    if not all(map(_is_bias, gen.sequence_bias or ())):
        yield "generation.sequence_bias", "is no list of [[token ids], bias] pairs"
    for key in ("generation.temperature", "generation.top_k", "generation.top_p"):
        given = getattr(gen, key.partition(".")[2]) is not None
        if given and not gen.do_sample and set_later(recipe, key, "generation.do_sample"):
            yield f"{key} generation.do_sample", "has no effect without generation.do_sample: true"


def _is_bias(pair: Any) -> bool:
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list) and pair[0]):
        return False
    ids, bias = pair
    return all(type(token) is int and token >= 0 for token in ids) and type(bias) in (int, float)


def check_distributed(recipe: Recipe) -> Iterator[Finding]:
    distributed, training = recipe.distributed, recipe.training
    if distributed.strategy != "fsdp":
        for key in ("cpu_offload", "param_dtype"):
            if distributed.strategy == "ddp" and set_later(recipe, f"distributed.{key}", "distributed.strategy"):
                yield f"distributed.{key} distributed.strategy", "has no effect while distributed.strategy is ddp"
        return
    for key, message in sharding_obstacles(recipe):
        yield f"distributed.strategy {key}", f"is fsdp, which {message}"
    if distributed.param_dtype == "bf16" and training.precision not in ("auto", "bf16"):
        keys = "distributed.param_dtype training.precision"
        yield keys, f"is bf16, and training.precision is {training.precision}; let them agree"


def sharding_obstacles(recipe: Recipe) -> Iterator[Finding]:
    """Settings that a sharded model cannot serve: the key, and what to write instead."""
    if recipe.quantization.load_in_4bit:
        advice = "does not hold 4-bit weights safely yet; train with ddp, or without quantization"
        yield "quantization.load_in_4bit", advice
    if recipe.training.optim != "adamw":
        yield "training.optim", "spreads the moments of torch's AdamW only; set training.optim: adamw"
    if recipe.training.auto_batch_size:
        yield (
            "training.auto_batch_size",
            "cannot try batches out: a rank that fails leaves the others waiting; turn it off",
        )


def check_paths(recipe: Recipe) -> Iterator[Finding]:
    for key in PATHS:
        section, _, name = key.partition(".")
        path = getattr(getattr(recipe, section), name)
        if path is None:
            continue
        if not path.strip() or len(path) > 1024 or any(len(part.encode()) > 255 for part in path.split("/")):
            yield key, "is no usable path: empty, or longer than file systems allow"
        elif "://" in path or any(ord(character) < 32 for character in path):
            yield key, "must be a local path"


CHECKS: tuple[Callable[[Recipe], Iterator[Finding]], ...] = (
    check_model,
    check_adapters,
    check_training,
    check_data,
    check_prompt,
    check_evaluation,
    check_generation,
    check_distributed,
    check_paths,
)


def findings(recipe: Recipe) -> list[tuple[list[str], str]]:
    """Everything the rules object to: the keys looked at, the one to blame first, and what is wrong."""
    return [(keys.split(), message) for check in CHECKS for keys, message in check(recipe)]

"""Rules between the sections of a recipe: combinations that would fail late, or quietly do something else than asked.

Each rule yields `(keys, message)`: the keys it looked at (the first one is blamed) and one line that says what is wrong and
what to write instead. Rules see a recipe whose single values are all valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from engine.recipe import Recipe

Finding = tuple[tuple[str, ...], str]
COMMIT = re.compile(r"[0-9a-f]{40}\Z")
T5_NAME = re.compile(r"(?:^|[/_-])(?:ko-?|m|pko-|flan-|byt|umt|long-?)?t5(?![a-z])|(?:^|[/_-])ul2\b", re.IGNORECASE)
SEQ2SEQ_NAME = re.compile(r"bart", re.IGNORECASE)
T5_TYPES = {"t5", "mt5", "umt5", "longt5"}
SEQ2SEQ_TYPES = T5_TYPES | {"bart", "mbart", "pegasus", "led", "blenderbot", "marian", "m2m_100"}
# A config may name code to be loaded; a recipe may not.
CODE_IN_CONFIG = {"auto_map", "custom_generate", "trust_remote_code", "quantization_config", "auto_class"}


def is_t5(recipe: Recipe) -> bool:
    """Whether name or config say T5, whose activations leave the range of fp16."""
    model_type = (recipe.model.config or {}).get("model_type")
    return model_type in T5_TYPES or bool(T5_NAME.search(recipe.model.name_or_path or ""))


def is_seq2seq(recipe: Recipe) -> bool:
    """Whether family, config or name say encoder-decoder; models.py knows better once the config is read."""
    if recipe.model.family != "auto":
        return recipe.model.family == "seq2seq"
    model_type = (recipe.model.config or {}).get("model_type")
    if model_type is not None:
        return model_type in SEQ2SEQ_TYPES
    return is_t5(recipe) or bool(SEQ2SEQ_NAME.search(recipe.model.name_or_path or ""))


def set_later(recipe: Recipe, key: str, than: str) -> bool:
    """Whether `key` was set by a layer above the one that decided `than` (command line over recipe over base)."""
    return recipe._layer(key)[0] > recipe._layer(than)[0]


def check_model(recipe: Recipe) -> Iterator[Finding]:
    model, name = recipe.model, recipe.model.name_or_path
    if model.init == "pretrained" and not name:
        yield (
            ("model.name_or_path", "model.init"),
            "is missing; write a hub id or a folder (or model.init: random with model.config)",
        )
    if name and ("://" in name or name != name.strip()):
        yield ("model.name_or_path",), "is not a hub id or a local folder"
    if model.init == "random" and not name and not (model.config or {}).get("model_type"):
        yield (
            ("model.init", "model.config", "model.name_or_path"),
            "is random, which needs model.config with model_type, or a folder with config.json at model.name_or_path",
        )
    if (
        model.init == "random"
        and not name
        and not recipe.tokenizer.name_or_path
        and not recipe.tokenizer.train_vocab_size
    ):
        yield (
            ("model.init", "tokenizer.name_or_path", "tokenizer.train_vocab_size"),
            "is random without a tokenizer; set tokenizer.train_vocab_size or tokenizer.name_or_path",
        )
    if model.trust_remote_code and not COMMIT.match(model.revision or ""):
        yield (
            ("model.trust_remote_code", "model.revision"),
            "runs code of the model's author, so it needs model.revision as a full commit of 40 hex digits",
        )
    for key in sorted(model.config or {}):
        if key in CODE_IN_CONFIG or key.startswith("_"):
            yield (
                (f"model.config.{key}",),
                "is refused: a recipe may not choose code or private settings through the config",
            )


def check_adapters(recipe: Recipe) -> Iterator[Finding]:
    lora, four_bit = recipe.lora, recipe.quantization.load_in_4bit
    if four_bit and lora.enabled is False:
        yield (
            ("quantization.load_in_4bit", "lora.enabled"),
            "cannot train 4-bit weights without adapters; drop lora.enabled: false",
        )
    adapters = lora.enabled or (lora.enabled is None and four_bit)
    for key in ("use_rslora", "use_dora", "loraplus_lr_ratio", "modules_to_save"):
        if getattr(lora, key) and not adapters:
            yield (
                (f"lora.{key}", "lora.enabled", "quantization.load_in_4bit"),
                "has no effect while no adapter is trained; set lora.enabled: true",
            )
    if lora.use_dora and lora.use_rslora:
        yield ("lora.use_dora", "lora.use_rslora"), "and lora.use_rslora change the same scale; choose one"


def check_precision(recipe: Recipe) -> Iterator[Finding]:
    training, runtime = recipe.training, recipe.runtime
    if training.precision == "fp16" and is_t5(recipe):
        yield (
            ("training.precision", "model.name_or_path", "model.config"),
            "is fp16, in which T5 models overflow; use bf16, fp32 or auto",
        )
    if training.precision == "fp16" and runtime.device == "cpu" and not runtime.emulate_fp16_on_cpu:
        yield (
            ("training.precision", "runtime.device", "runtime.emulate_fp16_on_cpu"),
            "is fp16, which CPUs run as fp32; use bf16 or fp32",
        )
    if training.optim.startswith("paged") and runtime.device == "cpu":
        yield (
            ("training.optim", "runtime.device"),
            f"is {training.optim}, which needs CUDA; on a CPU use adamw or adamw_8bit",
        )
    warm_up = training.warmup_steps or (training.warmup_steps is None and training.warmup_ratio)
    if training.lr_scheduler_type == "constant" and warm_up:
        yield (
            ("training.lr_scheduler_type", "training.warmup_steps", "training.warmup_ratio"),
            "is constant, which has no warm-up; use constant_with_warmup, or warmup_ratio: 0",
        )


def check_data(recipe: Recipe) -> Iterator[Finding]:
    data, evaluates = recipe.data, recipe.evaluation.strategy != "no"
    if not data.train_file:
        yield ("data.train_file",), "is missing"
    if evaluates and not data.validation_file:
        yield ("data.validation_file", "evaluation.strategy"), "is missing; name one, or set evaluation.strategy: 'no'"
    if data.on_bad_row == "skip" and not data.max_bad_rows:
        yield ("data.on_bad_row", "data.max_bad_rows"), "is skip, which needs a cap: set data.max_bad_rows"
    summaries = [data.summary_column] if isinstance(data.summary_column, str) else data.summary_column
    columns = [data.text_column, *summaries, data.id_column, data.topic_column]
    named = [column for column in columns if column is not None]
    if not summaries or len(set(named)) < len(named) or not all(named):
        yield (
            ("data.summary_column", "data.text_column", "data.id_column", "data.topic_column"),
            "and the other columns must be named, each once",
        )
    if any(not token.strip() for token in recipe.tokenizer.added_tokens) or len(
        set(recipe.tokenizer.added_tokens)
    ) < len(recipe.tokenizer.added_tokens):
        yield ("tokenizer.added_tokens",), "must not hold an empty or repeated token"


def check_prompt(recipe: Recipe) -> Iterator[Finding]:
    style = recipe.prompt.style
    if style == "chat" and is_seq2seq(recipe):
        yield (
            ("prompt.style", "model.family", "model.name_or_path", "model.config"),
            "is chat, which encoder-decoder models have no template for; use plain or instruction",
        )
    if recipe.data.instruction_augmentation and style == "plain":
        yield (
            ("data.instruction_augmentation", "prompt.style"),
            "needs instructions; set prompt.style: instruction or chat",
        )
    if recipe.prompt.prefix and style != "plain":
        yield ("prompt.prefix", "prompt.style"), f"belongs to the plain style, and prompt.style is {style}"


def check_evaluation(recipe: Recipe) -> Iterator[Finding]:
    evaluation, training = recipe.evaluation, recipe.training
    rouge = evaluation.metric != "loss"
    if evaluation.strategy != "no" and rouge and not evaluation.generate:
        yield (
            ("evaluation.metric", "evaluation.generate"),
            f"is {evaluation.metric}, which evaluation does not produce without generate: true; use loss, or generate",
        )
    if evaluation.strategy == "no" and set_later(recipe, "evaluation.metric", "evaluation.strategy"):
        yield ("evaluation.metric", "evaluation.strategy"), "chooses nothing while evaluation.strategy is 'no'"
    if training.early_stopping_patience and evaluation.strategy == "no":
        yield (
            ("training.early_stopping_patience", "evaluation.strategy"),
            "needs evaluations, and evaluation.strategy is 'no'",
        )
    for name in ("evaluation", "checkpoint"):
        section = getattr(recipe, name)
        if section.strategy == "steps" and not section.steps:
            yield (f"{name}.strategy", f"{name}.steps"), f"is steps, which needs {name}.steps"
        if section.strategy != "steps" and section.steps and set_later(recipe, f"{name}.steps", f"{name}.strategy"):
            yield (
                (f"{name}.steps", f"{name}.strategy"),
                f"has no effect while {name}.strategy is {section.strategy}; set it to steps",
            )


def check_generation(recipe: Recipe) -> Iterator[Finding]:
    gen = recipe.generation
    most = gen.max_new_tokens or (recipe.data.max_target_length if gen.max_length is None else None)
    if most is not None and (gen.min_new_tokens or 0) > most:
        yield (
            (
                "generation.min_new_tokens",
                "generation.max_new_tokens",
                "generation.max_length",
                "data.max_target_length",
            ),
            f"is {gen.min_new_tokens}, above the most new tokens, {most}",
        )
    if gen.max_length is not None and gen.max_new_tokens is None and (gen.min_length or 0) > gen.max_length:
        yield (
            ("generation.min_length", "generation.max_length", "generation.max_new_tokens"),
            f"is {gen.min_length}, above generation.max_length, {gen.max_length}",
        )
    if gen.num_return_sequences > gen.num_beams and not gen.do_sample:
        yield (
            ("generation.num_return_sequences", "generation.num_beams", "generation.do_sample"),
            f"is {gen.num_return_sequences}, above generation.num_beams, {gen.num_beams}",
        )
    if gen.block_scripts and gen.allow_scripts is not None:
        yield (
            ("generation.block_scripts", "generation.allow_scripts"),
            "and generation.allow_scripts exclude each other; choose one",
        )
    if gen.allow_scripts == []:
        yield ("generation.allow_scripts",), "allows nothing; name scripts, or null for all"
    for key in ("temperature", "top_k", "top_p"):
        if (
            not gen.do_sample
            and set_later(recipe, f"generation.{key}", "generation.do_sample")
            and getattr(gen, key) is not None
        ):
            yield (f"generation.{key}", "generation.do_sample"), "has no effect without generation.do_sample: true"


def check_paths(recipe: Recipe) -> Iterator[Finding]:
    for key in (
        "experiment.output_root",
        "experiment.output_dir",
        "data.train_file",
        "data.validation_file",
        "data.test_file",
    ):
        section, _, name = key.partition(".")
        path = getattr(getattr(recipe, section), name)
        if path is None or (name.endswith("_file") and path == ""):
            continue
        if not path.strip() or len(path) > 1024 or any(len(part.encode()) > 255 for part in path.split("/")):
            yield (key,), "is not a usable path (empty, or longer than file systems allow)"
        elif "://" in path or any(ord(character) < 32 for character in path):
            yield (key,), "must be a local path"


CHECKS: tuple[Callable[[Recipe], Iterator[Finding]], ...] = (
    check_model,
    check_adapters,
    check_precision,
    check_data,
    check_prompt,
    check_evaluation,
    check_generation,
    check_paths,
)


def findings(recipe: Recipe) -> list[Finding]:
    """Everything the rules object to, in the order of the sections above."""
    return [finding for check in CHECKS for finding in check(recipe)]

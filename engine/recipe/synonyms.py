"""Which key did the user mean? Names that other trainers give to our keys, and the nearest name for the rest."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache

from engine.recipe.schema import SECTIONS

# Ours -> theirs (transformers, trl, LLaMA-Factory, axolotl, torchtune, litgpt and the scripts people bring along).
_THEIRS = {
    "experiment.name": "run_name exp_name experiment_name",
    "experiment.output_dir": "out_dir output save_dir",
    "model.name_or_path": "model_name_or_path base_model model_name checkpoint_dir pretrained_model model_id",
    "model.attn_implementation": "attn_impl flash_attn flash_attention",
    "tokenizer.name_or_path": "tokenizer_name tokenizer_name_or_path tokenizer_path",
    "tokenizer.added_tokens": "special_tokens additional_special_tokens add_special_tokens new_tokens",
    "quantization.load_in_4bit": "quantization_bit quantize use_qlora qlora use_4bit load_in_8bit",
    "quantization.bnb_4bit_quant_type": "quant_type",
    "quantization.bnb_4bit_use_double_quant": "double_quant use_double_quant double_quantization",
    "quantization.bnb_4bit_compute_dtype": "compute_dtype",
    "lora.enabled": "use_lora use_peft peft adapter",
    "lora.r": "lora_r lora_rank rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_target_linear lora_attn_modules",
    "lora.use_dora": "peft_use_dora dora",
    "lora.use_rslora": "peft_use_rslora rslora",
    "lora.modules_to_save": "additional_target lora_modules_to_save",
    "data.train_file": "train_path train_data data_path dataset datasets train_csv",
    "data.validation_file": "dev_file val_file valid_file eval_file dev_path val_path val_data dev_data",
    "data.test_file": "test_path test_data predict_file",
    "data.text_column": "dialogue_column source_column input_column",
    "data.summary_column": "target_column label_column reference_column",
    "data.id_column": "fname_column",
    "data.max_source_length": "encoder_max_len max_input_length cutoff_len sequence_len max_seq_length max_seq_len",
    "data.max_target_length": "decoder_max_len max_output_length max_summary_length",
    "data.max_train_samples": "max_samples num_train_samples",
    "data.max_validation_samples": "max_eval_samples",
    "data.max_test_samples": "max_predict_samples",
    "data.batching": "group_by_length train_sampling_strategy",
    "data.cache": "overwrite_cache use_cache_dir dataset_cache tokenized_path dataset_prepared_path",
    "data.tokens_per_batch": "max_tokens_per_batch token_budget batch_tokens",
    "prompt.prefix": "source_prefix",
    "prompt.style": "chat_template",
    "prompt.template": "prompt_template",
    "prompt.system": "system_prompt default_system",
    "training.num_train_epochs": "num_epochs epochs max_epochs n_epochs epoch",
    "training.max_steps": "max_steps_per_epoch num_steps total_steps",
    "training.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_gpu_train_batch_size",
    "training.gradient_accumulation_steps": "global_batch_size grad_accum accumulation_steps accumulate_grad_batches",
    "training.learning_rate": "lr peak_lr",
    "training.weight_decay": "wd",
    "training.warmup_steps": "lr_warmup_steps num_warmup_steps",
    "training.lr_scheduler_type": "lr_scheduler scheduler scheduler_type lr_schedule",
    "training.optim": "optimizer optimizer_type optimizer_name",
    "training.max_grad_norm": "clip_grad_norm max_norm gradient_clip_val grad_clip gradient_clipping",
    "training.precision": "bf16 fp16 dtype torch_dtype use_bf16 use_fp16 mixed_precision amp",
    "training.gradient_checkpointing": "enable_activation_checkpointing activation_checkpointing use_reentrant",
    "training.label_smoothing": "label_smoothing_factor",
    "training.early_stopping_patience": "patience early_stopping_steps",
    "training.early_stopping_threshold": "min_delta",
    "training.auto_batch_size": "auto_find_batch_size",
    "training.seed": "random_seed data_seed",
    "evaluation.strategy": "eval_strategy evaluation_strategy",
    "evaluation.steps": "eval_steps run_val_every_n_steps evals_per_epoch eval_interval val_check_interval",
    "evaluation.metric": "metric_for_best_model best_metric",
    "evaluation.extra_metrics": "compute_metrics metrics",
    "evaluation.bertscore_model": "bert_score_model",
    "evaluation.generate": "predict_with_generate do_generate",
    "evaluation.per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "evaluation.rouge_tokenizer": "rouge_mode",
    "generation.num_beams": "generation_num_beams beam_size beams num_beam",
    "generation.max_new_tokens": "generation_max_length generate_max_length max_output_tokens max_gen_len",
    "generation.no_repeat_ngram_size": "no_repeat_ngram no_repeat_ngrams ngram_size",
    "checkpoint.strategy": "save_strategy",
    "checkpoint.steps": "save_steps save_interval save_every_n_steps saves_per_epoch",
    "checkpoint.save_total_limit": "keep_last max_checkpoints",
    "tracking.report_to": "use_tensorboard use_wandb logger_name metric_logger log_with logger",
    "tracking.wandb_project": "wandb_project_name project",
    "runtime.device": "cuda gpu",
    "runtime.timeout_seconds": "ddp_timeout timeout",
    "runtime.profile": "profiler torch_profiler profile_steps",
}
CANONICAL = {theirs: ours for ours, names in _THEIRS.items() for theirs in names.split()}
# Keys that need no counterpart here, and why.
NOT_NEEDED = {
    "greater_is_better": "loss counts as better when lower, ROUGE when higher",
    "load_best_model_at_end": "final_model/ always holds the best checkpoint",
    "resume_from_checkpoint": "write --resume auto or --resume PATH",
    "auto_resume_from_checkpoints": "write --resume auto",
    "overwrite_output_dir": "a run never overwrites another one",
    "logging_dir": "TensorBoard files lie in the run folder",
    "train_on_inputs": "only the summary is ever trained on",
    "train_on_prompt": "only the summary is ever trained on",
    "completion_only_loss": "only the summary is ever trained on",
    "mask_prompt": "only the summary is ever trained on",
    "device_map": "each rank holds the model on its own device",
    "push_to_hub": "nothing is uploaded",
}


@cache
def _owners() -> dict[str, list[str]]:
    """Bare key -> the full keys of that name."""
    owners: dict[str, list[str]] = {}
    for section, model in SECTIONS.items():
        for key in model.model_fields:
            owners.setdefault(key, []).append(f"{section}.{key}")
    return owners


def _related(section: str | None, bare: str) -> list[str]:
    """Keys of the section that hold the name as whole words: `name` is in `name_or_path`."""
    keys = SECTIONS[section].model_fields if section in SECTIONS else ()
    return [f"{section}.{key}" for key in keys if f"_{bare}_" in f"_{key}_"]


def keys_of(bare: str, sections: Sequence[str] = ()) -> list[str]:
    """The full keys that a name without a section stands for, those of `sections` first; none where nothing is near."""
    for section in sections:
        if len(found := _related(section, bare)) == 1:
            return found
    return [CANONICAL[bare]] if bare in CANONICAL else _owners().get(bare, [])


def suggest(section: str | None, key: str) -> str:
    """A hint for an unknown `section.key` (or a bare `key` without a section): "; did you mean ...?", or ""."""
    bare = key.lower().replace("-", "_")
    if bare in NOT_NEEDED:
        return f"; not needed: {NOT_NEEDED[bare]}"
    found = _meant(section, bare)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _meant(section: str | None, bare: str) -> list[str]:
    """The section's own keys come before those of other sections, and exact names before near ones."""
    names = list(SECTIONS[section].model_fields) if section in SECTIONS else []
    known, related = CANONICAL.get(bare), _related(section, bare)
    if bare in names:
        return [f"{section}.{bare}"]
    if known is not None and known.startswith(f"{section}."):
        return [known]
    if len(related) == 1:
        return related
    if known is not None:
        return [known]
    close = difflib.get_close_matches(bare, names, n=1, cutoff=0.8)
    if close:
        return [f"{section}.{close[0]}"]
    if bare in _owners():
        return _owners()[bare]
    close = difflib.get_close_matches(bare, [*names, *_owners(), *CANONICAL], n=1, cutoff=0.7)
    if not close:
        return []
    return [f"{section}.{close[0]}"] if close[0] in names else keys_of(close[0])


def suggest_section(name: str) -> str:
    """A hint for an unknown top-level name: a section's, or the section that a bare key belongs to."""
    bare = name.lower().replace("-", "_")
    exact = bare in CANONICAL or bare in _owners() or bare in NOT_NEEDED
    close = difflib.get_close_matches(bare, SECTIONS, n=1, cutoff=0.65)
    if close and not exact:
        return f"; did you mean {close[0]}?"
    return suggest(None, name) or f"; the sections are {', '.join(SECTIONS)}"

"""The same weights, rows and settings give transformers' own trainers' losses, update by update."""

from __future__ import annotations

import copy

import pytest
import runs
import torch
from torch.nn import functional as F

from engine.data import encode
from engine.data import rows as data_rows
from engine.loss.cross_entropy import aligned_labels
from engine.models import build
from engine.recipe.load import load_recipe

pytestmark = pytest.mark.slow

SETTINGS = {
    "model__dropout": 0.0,
    "data__batching": "sequential",
    "training__per_device_train_batch_size": 2,
    "training__gradient_accumulation_steps": 4,
    "training__learning_rate": 3e-3,
    "training__weight_decay": 0.1,
    "training__warmup_ratio": 0.1,
    "training__lr_scheduler_type": "cosine",
    "training__max_grad_norm": 0.5,
    "evaluation__strategy": "no",
    "checkpoint__strategy": "no",
}


class Rows(torch.utils.data.Dataset):
    def __init__(self, features):
        self.features = features

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return self.features[index]


def token_mean(outputs, labels, num_items_in_batch=None):
    """Sum over the batch, divided by the supervised tokens of the whole update.

    The trainer must be given this: Bart's and T5's classes take the keyword `num_items_in_batch` without using it, upon
    which the trainer adds the micro-batches' means up and neither divides by the tokens nor by the accumulation steps.
    """
    batch = {"labels": labels, "decoder_input_ids": labels}
    flat = aligned_labels(batch).flatten()
    return F.cross_entropy(outputs.logits.flatten(0, 1).float(), flat, reduction="sum") / num_items_in_batch


def peer_losses(bundle, features, recipe, folder, updates, **options):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

    losses, rates = [], []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])
                rates.append(logs["learning_rate"])

    class InOrder:
        def _get_train_sampler(self, *arguments):
            return torch.utils.data.SequentialSampler(Rows(features))

    seq2seq = bundle.family == "seq2seq"
    training = recipe.training
    arguments = (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(
        output_dir=str(folder / "peer"),
        max_steps=updates,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_ratio,
        lr_scheduler_type=training.lr_scheduler_type,
        max_grad_norm=training.max_grad_norm,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        optim="adamw_torch",
    )
    kind = type("Peer", (InOrder, Seq2SeqTrainer if seq2seq else Trainer), {})
    trainer = kind(
        model=bundle.model,
        args=arguments,
        train_dataset=Rows(features),
        data_collator=bundle.collate,
        callbacks=[Keep()],
        **options,
    )
    trainer.train()
    return losses, rates


def compare(tmp_path, family, updates, rows, *, options=None, **changes):
    path = runs.write_recipe(tmp_path, family, rows=rows, **(SETTINGS | changes))
    recipe = load_recipe(path)
    bundle = build.build_model(recipe, device=torch.device("cpu"), precision="fp32")
    examples = data_rows.read_examples(recipe.data.train_file, recipe.data, require_summary=True)
    features = encode.encode_all(bundle.text_encoder(), examples)
    peer = copy.deepcopy(bundle)
    losses, _ = peer_losses(peer, features, recipe, tmp_path, updates, **(options or {}))

    runs.train(path)
    ours = [row["loss"] for row in runs.rows_of(tmp_path / "run")]
    assert len(ours) == len(losses) == updates
    assert ours == pytest.approx(losses, rel=1e-5)
    assert ours[-1] < 0.98 * ours[0], "the comparison says little unless the model learns"
    return features


def test_seq2seq_trainer_with_a_loss_per_token(tmp_path):
    features = compare(tmp_path, "bart", updates=30, rows=240, options={"compute_loss_func": token_mean})
    assert len({len(feature.labels) for feature in features}) > 1


def test_seq2seq_trainer_t5(tmp_path):
    compare(tmp_path, "t5", updates=10, rows=80, options={"compute_loss_func": token_mean})


def test_trainer_llama_with_lora(tmp_path):
    compare(
        tmp_path,
        "llama",
        updates=20,
        rows=160,
        lora__enabled=True,
        lora__dropout=0.0,
        lora__train_added_tokens=False,
        training__learning_rate=2e-2,
    )

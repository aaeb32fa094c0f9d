"""The Python API for a trained model: dialogues in, summaries out.

predictor = Predictor.from_run("experiments/20260101/20260101_120000_kobart")
predictor.predict_single("#Person1#: ...")
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.checkpoints.history import pointed_at
from engine.data.prompts import PromptSettings
from engine.errors import EngineError
from engine.models.load import load_trained
from engine.prediction.files import examples_of
from engine.prediction.submission import submission_table, without_empty, write_submission
from engine.prediction.summarizer import Summarizer, Summary
from engine.recipe.load import COMMAND_LINE, load_recipe, with_overrides
from engine.recipe.schema import Generation, Recipe
from engine.runtime import console

if TYPE_CHECKING:
    import pandas as pd

    from engine.data.encode import Feature
    from engine.data.rows import Example
    from engine.models.bundle import ModelBundle

log = logging.getLogger("engine.predict")


class Predictor:
    """Summarises with one trained model, under the prompt and generation settings it was trained with.

    Args:
        bundle: model, tokenizer and prompt settings.
        recipe: what it was trained with. Each call may override the generation settings by name; its `data` section names
            the data frames' columns.
    """

    def __init__(self, bundle: ModelBundle, recipe: Recipe) -> None:
        self.bundle, self.generation, self.data = bundle, recipe.generation, recipe.data
        self.encoder = bundle.text_encoder()

    @classmethod
    def from_run(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        precision: str | None = None,
        base: str | None = None,
    ) -> Predictor:
        """Load a run folder (its final model), a checkpoint, or any Hugging Face model or PEFT adapter folder.

        Args:
            device: "auto" takes the GPU where there is one.
            precision: fp32, bf16 or fp16; None: bf16 where the GPU has it, else fp32.
            base: replaces the base model that an adapter names.

        Raises:
            EngineError: E4 where no usable model is found.
        """
        folder = model_folder(Path(path))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        bundle = load_trained(folder, device=torch.device(device), precision=precision, base=base)
        return cls(bundle, recipe_of(folder))

    def override(self, recipe: Recipe) -> None:
        """Take over the generation settings, and what the command line says about lengths and prompt.

        Raises:
            EngineError: E2 for another prompt than the one the model was trained with.
        """

        def asked(section: str) -> list[str]:
            names = type(getattr(recipe, section)).model_fields
            return [name for name in names if recipe.origin(f"{section}.{name}") == COMMAND_LINE]

        bundle, self.generation = self.bundle, recipe.generation
        bundle.set_lengths(**{name: getattr(recipe.data, name) for name in asked("data") if name in bundle.lengths})
        if (changed := asked("prompt")) and bundle.prompt_is_known:
            what, key = "the model must be prompted the way it was trained", f"prompt.{changed[0]}"
            raise EngineError("E2.28", what, key, f"leave {key} out", safe="nothing was decoded")
        if changed:
            bundle.prompt = PromptSettings(**recipe.prompt.model_dump())
        elif not bundle.prompt_is_known:
            log.warning("the model came without prompt settings: prompt.style is %s", bundle.prompt.style)
        self.encoder = bundle.text_encoder()

    def predict_single(self, dialogue: str, **gen: Any) -> str:
        """Summary of one dialogue; `gen` overrides generation settings by `generate`'s names."""
        return self.predict_batch([dialogue], batch_size=1, show_progress=False, **gen)[0]

    def predict_batch(
        self, dialogues: Iterable[str], batch_size: int = 32, show_progress: bool = True, **gen: Any
    ) -> list[str]:
        """Summaries in the order of the dialogues."""
        return [summary.text for summary in self.summarize(dialogues, batch_size, show_progress, **gen)]

    def predict_dataframe(
        self,
        df: pd.DataFrame,
        text_column: str = "dialogue",
        summary_column: str = "summary",
        batch_size: int = 32,
        show_progress: bool = True,
        **gen: Any,
    ) -> pd.DataFrame:
        """A copy of `df` with the summaries in `summary_column`; the order and the index of the rows are kept.

        Raises:
            EngineError: E3 where the column is missing or a dialogue is empty.
        """
        _require_column(df, text_column)
        topics = df[self.data.topic_column].tolist() if self.data.topic_column in df.columns else None
        summaries = self.summarize(df[text_column].tolist(), batch_size, show_progress, topics=topics, **gen)
        return df.assign(**{summary_column: [summary.text for summary in summaries]})

    def create_submission(
        self,
        test_df: pd.DataFrame,
        output_path: str | Path,
        batch_size: int = 32,
        show_progress: bool = True,
        sample_submission: str | Path | None = None,
        **gen: Any,
    ) -> pd.DataFrame:
        """Predict `test_df` (columns fname, dialogue, or the run's own) and write a submission in the sample's format.

        Raises:
            EngineError: E3, before anything is decoded, where ids, order or columns do not fit the sample.
        """
        name, text = (
            own if own in test_df.columns and usual not in test_df.columns else usual
            for usual, own in (("fname", self.data.id_column), ("dialogue", self.data.text_column))
        )
        _require_column(test_df, name)
        ids = [str(value) for value in test_df[name]]
        submission_table(ids, ["?"] * len(ids), sample_submission)
        shown = {"batch_size": batch_size, "show_progress": show_progress}
        predicted = self.predict_dataframe(test_df, text, **shown, **gen)
        predicted["summary"] = without_empty(ids, list(predicted[text]), list(predicted["summary"]))
        write_submission(submission_table(ids, list(predicted["summary"]), sample_submission), Path(output_path))
        return predicted[[name, "summary"]]

    def summarize(
        self,
        dialogues: Iterable[str],
        batch_size: int = 32,
        show_progress: bool = False,
        topics: Sequence[Any] | None = None,
        **gen: Any,
    ) -> list[Summary]:
        """As `predict_batch`, with scores, n-best lists and how each text ended.

        Raises:
            EngineError: E2 for settings that cannot be, E3 naming the first dialogue or topic that is no text.
        """
        if isinstance(dialogues, str):
            what = "the dialogues are one text, which would be read letter by letter"
            raise EngineError("E3.31", what, "dialogues", "give a list, or use predict_single")
        if batch_size < 1:
            raise EngineError("E2.39", f"batch_size is {batch_size}", "batch_size", "give 1 or more")
        examples = examples_of(list(dialogues), topics)
        features = self.features(examples)
        summarizer = self.summarizer(batch_size, **gen)
        with console.meter(shown=show_progress, total=len(features), desc="summarise", unit="row") as bar:
            done = summarizer.summarize(
                self.bundle.model,
                features,
                [example.dialogue for example in examples],
                on_batch=lambda summaries: bar.update(len(summaries)),
            )
        return sorted(done, key=lambda summary: summary.index)

    def features(self, examples: Sequence[Example], first: int = 0) -> list[Feature]:
        """Tokenised prompts, indices from `first` on. Raises: EngineError E2 or E3 naming the row that cannot be prompted."""
        return [self.encoder.prompt_feature(example, index) for index, example in enumerate(examples, first)]

    def summarizer(self, batch_size: int, **gen: Any) -> Summarizer:
        """Raises: EngineError E2 for settings that cannot be."""
        return Summarizer(self.bundle, self.encoder, overridden(self.generation, gen), batch_size=batch_size)


def _require_column(df: pd.DataFrame, name: str) -> None:
    if name not in df.columns:
        raise EngineError("E3.30", f"no column {name!r}; there are {', '.join(map(str, df.columns))}", "data frame")


def model_folder(path: Path) -> Path:
    """The model inside `path`: a run's final_model or its best checkpoint, else the folder itself.

    Raises:
        EngineError: E4.20 where there is neither, E5.11 where the run's pointer to its best checkpoint is broken.
    """
    if (path / "final_model").is_dir():
        return path / "final_model"
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path
    for pointer in ("best.json", "last.json"):
        if (path / pointer).is_file():
            return pointed_at(path / pointer)
    raise EngineError(
        "E4.20", "no model here", str(path), "give a run folder or a model folder", safe="nothing was written"
    )


def recipe_of(folder: Path) -> Recipe:
    """The recipe that the model was trained with; the defaults for a foreign folder."""
    for place in (folder, folder.parent):
        if (place / "recipe.yaml").is_file():
            return load_recipe(place / "recipe.yaml")
    return Recipe()


def overridden(generation: Generation, gen: dict[str, Any]) -> Generation:
    """The section with some settings replaced. Raises: EngineError E2 for an unknown name or a bad value."""
    if not gen:
        return generation
    changes = {f"generation.{key}": value for key, value in gen.items()}
    try:
        return with_overrides(Recipe(generation=generation), changes, ("generation",)).generation
    except EngineError as error:  # in Python they are arguments of a call, without a section
        lines = [line.replace(f"{COMMAND_LINE}: ", "argument ") for line in error.problems]
        lines = [line.replace("generation.", "") for line in lines]
        raise EngineError(error.code, lines[0], problems=lines) from None

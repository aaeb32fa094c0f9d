"""What a recipe may say: typed sections, strict keys, a description for each.

`engine/recipe/load.py` reads recipes, `engine/recipe/rules.py` holds the rules between sections. One key per
line, however long, so that the page reads as the table it is.
"""

# fmt: off
from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator
from pydantic.fields import FieldInfo

LARGEST = 2**31 - 1  # what every C library below accepts as an int
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
TokenId = NonNegative
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
OwnMetric = Annotated[str, Field(pattern=r"^(max|min):[^\W\d]\w{0,63}\z")]
ExtraMetric = Annotated[str, Field(pattern=r"^(bertscore|[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w{0,63})\z")]
Script = Literal[
    "hangul", "latin", "kana", "han", "cyrillic", "greek", "arabic", "hebrew", "thai", "devanagari", "digits", "punctuation", "emoji", "other"
]

# Placeholders of the Korean DialogSum data. They are ordinary added tokens, never special ones, so that decoding keeps them.
PLACEHOLDERS = [
    *(f"#Person{n}#" for n in range(1, 8)),
    *("#PhoneNumber#", "#Address#", "#DateOfBirth#", "#PassportNumber#", "#SSN#", "#CardNumber#", "#CarNumber#", "#Email#", "#DateAndTime#"),
]


def admits(annotation: Any, kind: type) -> bool:
    """Whether a field of this annotation takes values of type `kind` itself (not inside a list or a dict)."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return any(admits(part, kind) for part in get_args(annotation))
    return annotation is kind or get_origin(annotation) is kind


class Section(BaseModel):
    """Common rules: unknown keys are refused, types are exact (`true` is no 1, "5" is no 5), also on assignment."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, validate_default=True,
                              allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _whole_floats(cls, value: Any, info: Any) -> Any:
        """`1e3` and `3.0` are welcome where a whole number belongs; 3.5 is not."""
        annotation = cls.model_fields[info.field_name].annotation
        whole = isinstance(value, float) and value.is_integer()
        return int(value) if whole and admits(annotation, int) and not admits(annotation, float) else value


class Experiment(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\z", json_schema_extra={"expected": "1 to 64 letters, digits, dots, dashes or underscores, not starting with a dot or dash"}, description="Name of the run; part of the run folder's name.")
    output_root: str = Field("experiments", description="Folder that holds all runs and their common results.csv.")
    output_dir: str | None = Field(None, description="Exact run folder; replaces the dated one under output_root.")
    notes: str | None = Field(None, description="Free text kept with the run.")


class Model(Section):
    name_or_path: str | None = Field(None, description="Hub id or local folder of the model (or of a PEFT adapter).")
    family: Literal["auto", "seq2seq", "causal"] = Field("auto", description="Encoder-decoder or causal LM; auto reads the model's config.")
    init: Literal["pretrained", "random"] = Field("pretrained", description="pretrained loads weights; random starts from `config`.")
    config: dict[str, Any] | None = Field(None, description="Values of a transformers config (with `model_type`); for init: random, or laid over the file at name_or_path.")
    revision: str | None = Field(None, description="Branch, tag or 40-digit commit of the hub repository.")
    trust_remote_code: bool = Field(False, description="Run code shipped with the model; needs a pinned 40-digit revision.")
    use_safetensors: bool | None = Field(None, description="true refuses pickled weights (pytorch_model.bin); null reads them, tensors only, where there are no others.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(None, description="Attention kernels; null lets transformers choose.")
    dropout: Ratio | None = Field(None, description="Replaces the model's own dropout probabilities (hidden, attention and activation where present).")


class Tokenizer(Section):
    name_or_path: str | None = Field(None, description="Hub id or folder; null uses the model's, or trains one when model.init is random.")
    added_tokens: list[str] = Field(default_factory=lambda: list(PLACEHOLDERS), description="Tokens that must stay whole; added where missing, never as special tokens.")
    train_vocab_size: Positive | None = Field(None, le=1_000_000, description="Vocabulary of a SentencePiece tokenizer trained on data.train_file when none is given.")
    train_model_type: Literal["unigram", "bpe"] = Field("unigram", description="Algorithm of the tokenizer trained here.")
    pad_to_multiple_of: Positive | None = Field(None, description="Round the embedding matrix up to a multiple of this many rows.")


class Quantization(Section):
    load_in_4bit: bool = Field(False, description="Load the base in 4 bits (bitsandbytes); train adapters on top: QLoRA.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit number format.")
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantise the quantisation constants too.")
    bnb_4bit_compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="Type of the matrix products; auto follows training.precision.")


class Lora(Section):
    enabled: bool | None = Field(None, description="Train adapters instead of the whole model; null: on when load_in_4bit is on.")
    r: Positive = Field(16, description="Rank of the update.")
    alpha: float = Field(32, gt=0, description="Scale numerator: the update is multiplied by alpha / r (alpha / sqrt(r) with rsLoRA).")
    dropout: Ratio = Field(0.05, description="Dropout on the adapter's input.")
    target_modules: list[str] | Literal["all-linear", "auto"] = Field("auto", description="Names of linears to adapt; auto: q,k,v,o,gate,up,down or the family's own names.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases to train.")
    use_rslora: bool = Field(False, description="Rank-stabilised scaling (Kalajdzievski, 2023).")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA (Liu et al., 2024).")
    loraplus_lr_ratio: float | None = Field(None, ge=1, le=1e6, description="LoRA+ (Hayou et al., 2024): learning rate of B over that of A.")
    modules_to_save: list[str] | None = Field(None, description="Modules trained in full beside the adapters.")
    train_added_tokens: bool = Field(True, description="Train the embedding rows of tokens added to the vocabulary (peft trainable_token_indices).")


class Data(Section):
    train_file: str | None = Field(None, description="CSV, JSONL or parquet with dialogues and summaries.")
    validation_file: str | None = Field(None, description="Same format; scores and the best checkpoint come from it.")
    test_file: str | None = Field(None, description="Predicted with the best checkpoint after training; summaries optional.")
    text_column: str = Field("dialogue", description="Column with the dialogue.")
    summary_column: str | list[str] = Field("summary", description="Column with the summary; a list names several references (the first one trains).")
    id_column: str | None = Field("fname", description="Column with unique ids; null numbers the rows.")
    topic_column: str | None = Field(None, description="Column given to the prompt as the topic; null leaves topics out.")
    encoding: str = Field("auto", description="auto tries UTF-8 (with or without BOM), then CP949.")
    max_source_length: Positive = Field(512, description="Longest source in tokens (causal LMs: the whole prompt).")
    max_target_length: Positive = Field(128, description="Longest summary in tokens with its end token.")
    max_train_samples: Positive | None = Field(None, description="Use only the first N training rows.")
    max_validation_samples: Positive | None = Field(None, description="Use only the first N validation rows.")
    max_test_samples: Positive | None = Field(None, description="Use only the first N test rows.")
    batching: Literal["random", "length", "sequential", "tokens"] = Field("length", description="Composition of updates: shuffled, shuffled among rows of like source length, or file order. tokens: by the lengths of source and target, and each update cut into micro-batches by tokens_per_batch.")
    tokens_per_batch: Positive | None = Field(None, description="For batching: tokens, most tokens of one micro-batch on one device, padding included; a longer row goes alone. null: what per_device_train_batch_size rows of greatest length hold. Updates keep per_device_train_batch_size x gradient_accumulation_steps rows on each device.")
    cache: bool = Field(True, description="Keep the token ids of files of 200 rows and more beside the Hugging Face cache (HF_HOME), so that the next run starts in seconds.")
    instruction_augmentation: bool = Field(False, description="Each training row under five Korean instructions (training data only).")
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip drops bad rows, up to max_bad_rows, and logs their ids.")
    max_bad_rows: NonNegative = Field(0, description="Most rows that on_bad_row: skip may drop.")
    allow_overlap: bool = Field(False, description="Accept validation dialogues that are also training dialogues.")


class Prompt(Section):
    style: Literal["plain", "instruction", "chat", "template"] = Field("plain", description="plain: the dialogue; instruction: ### sections; chat: the tokenizer's template; template: prompt.template.")
    template: str | None = Field(None, description="The prompt of style template: a text with {dialogue}, and {topic} or {instruction} where wanted; the answer follows its last letter.")
    prefix: str = Field("", description="Put before the dialogue in plain style (T5's task prefix).")
    instruction: str = Field("다음 대화를 읽고 핵심 내용을 한국어로 요약하세요.", description="The task in words, for instruction, chat and {instruction} of a template.")
    system: str | None = Field("당신은 한국어 대화를 간결하고 정확하게 요약하는 도우미입니다.", description="System message of the chat style; null leaves it out.")
    date_string: str = Field("01 Jan 2025", description="Date given to chat templates that print one, so that prompts do not change from day to day.")
    enable_thinking: bool = Field(False, description="Reasoning mode of templates that have one (Qwen3).")


class Training(Section):
    num_train_epochs: float = Field(3, gt=0, description="Passes over the training data.")
    max_steps: Positive | None = Field(None, description="Stop after this many updates; overrides num_train_epochs.")
    per_device_train_batch_size: Positive = Field(8, description="Examples of one micro-batch on one device.")
    gradient_accumulation_steps: Positive = Field(1, description="Micro-batches of one update on one device.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate.")
    weight_decay: Rate = Field(0.0, description="Decoupled weight decay; never on biases and norms.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Term added to the denominator.")
    warmup_steps: NonNegative | None = Field(None, description="Updates of linear warm-up; wins over warmup_ratio.")
    warmup_ratio: Ratio = Field(0.0, description="Warm-up as a share of all updates, rounded up.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field("cosine", description="Learning rate after the warm-up, counted in updates.")
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field("adamw", description="Optimizer; the paged ones need CUDA.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the global gradient norm to this; null does not clip.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="Compute type; auto: bf16 where the GPU has it, else fp32. Trainable weights stay fp32.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass: less memory, about a third more time.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target probability spread over the vocabulary.")
    early_stopping_patience: Positive | None = Field(None, description="Stop after this many evaluations without a better metric.")
    early_stopping_threshold: Rate = Field(0.0, description="Least gain that counts as better for early stopping.")
    logging_steps: Positive = Field(10, description="Updates between two training rows of the log.")
    seed: NonNegative = Field(42, description="Seed of weights, dropout and data order.")
    on_nonfinite: Literal["abort", "skip"] = Field("abort", description="What a NaN or infinite loss or gradient does (fp16 overflows are always skipped).")
    max_skipped_updates: NonNegative = Field(10, description="Skipped updates in a row before the run gives up.")
    auto_batch_size: bool = Field(False, description="On out-of-memory before the first update, halve the micro-batch and double the accumulation.")


class Evaluation(Section):
    strategy: Literal["epoch", "steps", "no"] = Field("epoch", description="When to evaluate.")
    steps: Positive | None = Field(None, description="Updates between evaluations for strategy: steps.")
    max_samples: Positive | None = Field(None, description="Evaluate a fixed, evenly spaced subset of this many rows during training.")
    metric: Literal["loss", "rouge1", "rouge2", "rougeL", "rouge_sum", "rouge_mean"] | OwnMetric = Field("rouge_sum", json_schema_extra={"expected": "one of loss, rouge1, rouge2, rougeL, rouge_sum, rouge_mean, or max:NAME or min:NAME of an extra metric"}, description="Chooses the best checkpoint; loss is better when lower, ROUGE when higher; max:NAME or min:NAME is an extra metric.")
    extra_metrics: list[ExtraMetric] = Field(default_factory=list, json_schema_extra={"expected": "a list of bertscore, or of installed code as module:function"}, description="Metrics beside ROUGE: bertscore, or installed code as module:function, which runs with --allow-code only.")
    bertscore_model: str | None = Field(None, description="Local folder of the encoder that BERTScore compares by.")
    bertscore_layer: Positive | None = Field(None, description="Layer whose vectors BERTScore compares; null: three quarters up (9 of 12).")
    rouge_tokenizer: Literal["mecab", "char", "whitespace"] = Field("mecab", description="Tokens that ROUGE counts; scores of different tokenizers do not compare.")
    per_device_eval_batch_size: Positive = Field(16, description="Most examples decoded at once on one device.")
    generate: bool = Field(True, description="Decode and score by ROUGE; false measures the loss only.")
    num_samples: NonNegative = Field(3, description="Rows of the sample table (dialogue, reference, prediction).")


class Generation(Section):
    """Every name of transformers' `generate`; the first block has our defaults, the rest is off unless set."""

    num_beams: Positive = Field(4, description="Beams; 1 is greedy.")
    max_new_tokens: Positive | None = Field(None, description="Most new tokens; null: data.max_target_length unless max_length is set.")
    max_length: Positive | None = Field(None, description="Total length of transformers' rule; max_new_tokens wins when both are set.")
    min_new_tokens: NonNegative | None = Field(None, description="No end token before this many new tokens.")
    min_length: NonNegative | None = Field(None, description="As min_new_tokens, counted like max_length.")
    no_repeat_ngram_size: NonNegative = Field(0, description="No n-gram of this size twice; 0 is off.")
    length_penalty: float = Field(1.0, ge=-100, le=100, description="Exponent of the length that divides a finished beam's score; above 1 favours long output.")
    repetition_penalty: AboveZero = Field(1.0, description="Above 1 makes tokens that are already there less likely.")
    early_stopping: bool | Literal["never"] = Field(True, description="When beam search may end.")
    do_sample: bool = Field(False, description="Draw tokens instead of taking the likeliest.")
    temperature: AboveZero | None = Field(None, description="Sampling temperature.")
    top_k: NonNegative | None = Field(None, description="Sample from the k likeliest.")
    top_p: Ratio | None = Field(None, description="Sample from the smallest set with this probability.")
    num_return_sequences: Positive = Field(1, description="Summaries returned for each dialogue (n-best).")
    # Ours
    block_scripts: list[Script] = Field(default_factory=list, description="Scripts that may not be written; placeholders are spared.")
    allow_scripts: list[Script] | None = Field(None, description="The only scripts that may be written.")
    keep_source_words: bool = Field(False, description="Let foreign words of the dialogue through the script rules (`Mr. Smith`).")
    repetition_scope: Literal["auto", "output", "all"] = Field("auto", description="What repetition rules look at; auto: output for causal LMs, all (transformers' rule) otherwise.")
    tokens_per_batch: Positive | None = Field(None, description="Budget of source plus beam tokens decoded at once; null: from the batch size.")
    cuda_graphs: bool = Field(False, description="Replay decoding steps as CUDA graphs where the model allows it; not yet proven on a GPU.")
    # Passed on under transformers' names
    min_p: Ratio | None = Field(None, description="transformers: min_p.")
    top_h: Ratio | None = Field(None, description="transformers: top_h.")
    typical_p: Ratio | None = Field(None, description="transformers: typical_p.")
    epsilon_cutoff: Ratio | None = Field(None, description="transformers: epsilon_cutoff.")
    eta_cutoff: Ratio | None = Field(None, description="transformers: eta_cutoff.")
    encoder_repetition_penalty: AboveZero | None = Field(None, description="transformers: encoder_repetition_penalty.")
    encoder_no_repeat_ngram_size: NonNegative | None = Field(None, le=1000, description="transformers: encoder_no_repeat_ngram_size.")
    bad_words_ids: Annotated[list[TokenIds], Field(min_length=1)] | None = Field(None, json_schema_extra={"expected": "a list of lists of token ids, none of them empty, or null"}, description="transformers: bad_words_ids.")
    sequence_bias: list[Any] | None = Field(None, min_length=1, json_schema_extra={"expected": "a list of [[token ids], bias] pairs, or null"}, description="transformers: sequence_bias, as [[token ids], bias] pairs.")
    suppress_tokens: list[TokenId] | None = Field(None, description="transformers: suppress_tokens.")
    begin_suppress_tokens: list[TokenId] | None = Field(None, description="transformers: begin_suppress_tokens.")
    exponential_decay_length_penalty: list[float] | None = Field(None, min_length=2, max_length=2, description="transformers: exponential_decay_length_penalty, as [start, factor].")
    renormalize_logits: bool | None = Field(None, description="transformers: renormalize_logits.")
    remove_invalid_values: bool | None = Field(None, description="transformers: remove_invalid_values.")
    guidance_scale: float | None = Field(None, description="transformers: guidance_scale.")
    max_time: AboveZero | None = Field(None, description="transformers: max_time, in seconds.")
    stop_strings: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, json_schema_extra={"expected": "a list of texts, none of them empty, or null"}, description="transformers: stop_strings.")
    use_cache: bool | None = Field(None, description="transformers: use_cache.")
    pad_token_id: TokenId | None = Field(None, description="transformers: pad_token_id.")
    bos_token_id: TokenId | None = Field(None, description="transformers: bos_token_id.")
    eos_token_id: TokenId | TokenIds | None = Field(None, json_schema_extra={"expected": "a token id, a list of some, or null"}, description="transformers: eos_token_id.")
    decoder_start_token_id: TokenId | None = Field(None, description="transformers: decoder_start_token_id.")
    forced_bos_token_id: TokenId | Literal[-1] | None = Field(None, json_schema_extra={"expected": "a token id, -1 (nothing is forced), or null"}, description="transformers: forced_bos_token_id; -1 switches off what the model forces.")
    forced_eos_token_id: TokenId | Literal[-1] | TokenIds | None = Field(None, json_schema_extra={"expected": "a token id, a list of some, -1 (nothing is forced), or null"}, description="transformers: forced_eos_token_id; -1 switches off what the model forces.")
    # Post-processing, each rule on its own and counted
    fix_placeholders: bool = Field(False, description="Remove an unfinished placeholder at the end.")
    fix_cut_word: bool = Field(False, description="Remove a word cut off by the length limit.")
    fix_full_stop: bool = Field(False, description="Add a missing full stop.")
    fix_particles: bool = Field(False, description="Close the space between a placeholder and its particle.")


class Checkpoint(Section):
    strategy: Literal["epoch", "steps", "no"] = Field("epoch", description="When to save; every evaluation that is the best so far is saved in any case.")
    steps: Positive | None = Field(None, description="Updates between saves for strategy: steps.")
    save_total_limit: Positive | None = Field(3, description="Latest checkpoints kept; the best is kept beside them. null keeps all.")
    sync: bool = Field(False, description="Wait for each save instead of writing in the background.")
    on_save_error: Literal["abort", "continue"] = Field("abort", description="What a failed save does to the run.")


class Tracking(Section):
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=lambda: ["tensorboard"], description="Trackers; [] for none.")
    wandb_project: str = Field("korean-dialogue-summarization", description="W&B project.")
    progress: bool = Field(True, description="Progress bars on the main rank.")


class Runtime(Section):
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,3})\z", json_schema_extra={"expected": "one of auto, cpu, cuda, cuda:<number>"}, description="auto takes the GPU of the local rank where there is one.")
    deterministic: bool = Field(False, description="Deterministic kernels only; slower on GPUs.")
    timeout_seconds: Positive = Field(1800, description="How long a rank waits for another in a collective.")
    profile: bool = Field(False, description="Write profile/summary.txt, the shares of data, forward, backward, optimizer, waiting, evaluation and saving, and a trace of two updates beside it.")
    num_threads: Positive | None = Field(None, le=1024, description="CPU threads; null leaves torch's choice.")
    emulate_fp16_on_cpu: bool = Field(False, description="Tests only: fp16 with a real GradScaler on the CPU, so that overflows and skipped updates are tried without a GPU.")


class Distributed(Section):
    strategy: Literal["auto", "ddp", "fsdp"] = Field("auto", description="How several ranks hold the model. ddp: each a whole copy; fsdp: each a part of every weight, gradient and moment (torch's FSDP2). auto shards where the memory estimate of a copy exceeds the device.")
    param_dtype: Literal["fp32", "bf16"] = Field("fp32", description="Type in which fsdp gathers weights. bf16 halves traffic and gathered memory, and rounds norms and the residual stream too.")
    cpu_offload: bool = Field(False, description="fsdp only: keep parts and optimizer in host memory; slower, for models that fit no other way.")


class Recipe(Section):
    experiment: Experiment = Field(default_factory=Experiment)
    model: Model = Field(default_factory=Model)
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    quantization: Quantization = Field(default_factory=Quantization)
    lora: Lora = Field(default_factory=Lora)
    data: Data = Field(default_factory=Data)
    prompt: Prompt = Field(default_factory=Prompt)
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    generation: Generation = Field(default_factory=Generation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)
    runtime: Runtime = Field(default_factory=Runtime)
    distributed: Distributed = Field(default_factory=Distributed)

    # "section.key" -> (rank of the layer that set it, where that was). Not part of the recipe's value.
    _origins: dict[str, tuple[int, str]] = PrivateAttr(default_factory=dict)

    def origin(self, key: str) -> str:
        """Where the value of `section.key` comes from: "recipes/kobart.yaml:12", "command line" or "default".

        Keys below a dictionary (`model.config.d_model`) have origins of their own.
        """
        return self._origins.get(self._known(key), (0, "default"))[1]

    @property
    def is_debug(self) -> bool:
        """Whether base/debug.yaml was laid over it, by --debug or as a base."""
        return any(where.rpartition(":")[0].endswith("base/debug.yaml") for _, where in self._origins.values())

    def layer(self, key: str) -> int:
        """Rank of the layer that set `section.key`; 0 for defaults, larger numbers win."""
        return self._origins.get(self._known(key), (0, "default"))[0]

    def _known(self, key: str) -> str:
        while key not in self._origins and key.count(".") > 1:
            key = key.rpartition(".")[0]
        return key

    def __eq__(self, other: object) -> bool:
        """Recipes are equal when all values are, wherever they came from."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in Recipe.model_fields.items()}


def field_of(section: str, key: str) -> FieldInfo:
    """The declaration of a key: default, annotation, description."""
    return SECTIONS[section].model_fields[key]

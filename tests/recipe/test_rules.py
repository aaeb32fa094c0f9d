"""A corpus of bad recipes and overrides: each one is refused with exit code 2, in one line, at the right place."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import load_recipe
from engine.errors import EngineError

HEAD = "model:\n  name_or_path: some/model\ndata:\n  train_file: train.csv\n  validation_file: dev.csv\n"  # 5 lines

# (text after HEAD, line of the error, what the line must say)
BAD_TEXT = [
    # unknown sections and keys, with the nearest name
    ("trainer:\n  seed: 1\n", 6, "did you mean training?"),
    ("learning_rate: 1e-5\n", 6, "did you mean training.learning_rate?"),
    ("optimizer:\n  lr: 1\n", 6, "did you mean training.optim?"),
    ("zzz: 1\n", 6, "the sections are experiment, model"),
    ("training:\n  learning_rat: 1e-5\n", 7, "did you mean training.learning_rate?"),
    ("training:\n  batch_size: 5\n", 7, "did you mean training.per_device_train_batch_size?"),
    ("training:\n  num_epochs: 5\n", 7, "did you mean training.num_train_epochs?"),
    ("training:\n  LEARNING_RATE: 1\n", 7, "did you mean training.learning_rate?"),
    ("training:\n  bf16: true\n", 7, "did you mean training.precision?"),
    ("training:\n  num_beams: 3\n", 7, "did you mean generation.num_beams?"),
    ("training:\n  greater_is_better: true\n", 7, "loss counts as better when lower"),
    ("training:\n  load_best_model_at_end: true\n", 7, "final_model/ always holds the best"),
    ("lora:\n  lora_alpha: 3\n", 7, "did you mean lora.alpha?"),
    ("lora:\n  rank: 3\n", 7, "did you mean lora.r?"),
    ("generation:\n  beam_size: 3\n", 7, "did you mean generation.num_beams?"),
    ("generation:\n  qqqq: 3\n", 7, "generation.qqqq is not a key of generation"),
    ("data:\n  eval_file: x\n", 6, "data is given twice (first on line 3)"),
    ("evaluation:\n  eval_steps: 3\n", 7, "did you mean evaluation.steps?"),
    ("checkpoint:\n  keep_last: 3\n", 7, "did you mean checkpoint.save_total_limit?"),
    # wrong types: nothing is converted behind the user's back
    ("training: 5\n", 6, "training is a section and needs keys below it; got 5"),
    ("training: [a]\n", 6, "training is a section"),
    ("training:\n  seed: true\n", 7, "training.seed must be a whole number at least 0; got true"),
    ("training:\n  seed: '5'\n", 7, "write it without quotes"),
    ("training:\n  seed: 5.5\n", 7, "got 5.5"),
    ("training:\n  seed: -1\n", 7, "at least 0; got -1"),
    ("training:\n  seed: 99999999999999999999\n", 7, "training.seed must be"),
    ("training:\n  seed: [1]\n", 7, "got [1]"),
    ("training:\n  seed: {a: 1}\n", 7, "got {a: 1}"),
    ("training:\n  seed:\n", 7, "got null"),
    ("training:\n  seed: 010\n", 7, "got '010'"),
    ("training:\n  seed: 0x10\n", 7, "got '0x10'"),
    ("training:\n  seed: 1_000\n", 7, "got '1_000'"),
    ("training:\n  seed: 12:30\n", 7, "got '12:30'"),
    ("training:\n  max_steps: 0\n", 7, "above 0 or null; got 0"),
    ("training:\n  learning_rate: fast\n", 7, "a number above 0; got 'fast'"),
    ("training:\n  learning_rate: 0\n", 7, "above 0; got 0"),
    ("training:\n  learning_rate: -1e-5\n", 7, "above 0"),
    ("training:\n  learning_rate: .nan\n", 7, "must be a finite number; got nan"),
    ("training:\n  learning_rate: .inf\n", 7, "must be a finite number; got inf"),
    ("training:\n  learning_rate: 1e999\n", 7, "must be a finite number"),
    ("training:\n  learning_rate: true\n", 7, "got true"),
    ("training:\n  learning_rate: 1,5\n", 7, "got '1,5'"),
    ("training:\n  warmup_ratio: 1.5\n", 7, "at least 0 and at most 1; got 1.5"),
    ("training:\n  adam_beta1: 1.0\n", 7, "below 1"),
    ("training:\n  label_smoothing: 1\n", 7, "below 1; got 1"),
    ("training:\n  gradient_checkpointing: yes\n", 7, "true or false; got 'yes'"),
    ("training:\n  gradient_checkpointing: on\n", 7, "true or false; got 'on'"),
    ("training:\n  gradient_checkpointing: 1\n", 7, "true or false; got 1"),
    ("training:\n  lr_scheduler_type: cosin\n", 7, "did you mean cosine?"),
    ("training:\n  optim: adamw_torch\n", 7, "one of adamw, adamw_8bit, paged_adamw_32bit"),
    ("training:\n  precision: float16\n", 7, "one of auto, fp32, bf16, fp16"),
    ("training:\n  num_train_epochs: 0\n", 7, "above 0"),
    ("training:\n  max_grad_norm: 0\n", 7, "above 0 or null"),
    ("training:\n  per_device_train_batch_size: 0\n", 7, "above 0"),
    ("evaluation:\n  metric: rougel\n", 7, "did you mean rougeL?"),
    ("evaluation:\n  metric: bleu\n", 7, "one of loss, rouge1"),
    ("evaluation:\n  strategy: false\n", 7, "one of epoch, steps, no; got false"),
    ("evaluation:\n  rouge_tokenizer: okt\n", 7, "one of mecab, char, whitespace"),
    ("generation:\n  num_beams: 0\n", 7, "above 0"),
    ("generation:\n  num_beams: 2.5\n", 7, "got 2.5"),
    ("generation:\n  max_new_tokens: -5\n", 7, "above 0 or null"),
    ("generation:\n  repetition_penalty: 0\n", 7, "above 0"),
    ("generation:\n  repetition_penalty: -1.2\n", 7, "above 0"),
    ("generation:\n  length_penalty: long\n", 7, "a number at least -100 and at most 100; got 'long'"),
    ("generation:\n  early_stopping: always\n", 7, "true or false or never"),
    ("generation:\n  block_scripts: latin\n", 7, "write a list: [latin]"),
    ("generation:\n  block_scripts: [klingon]\n", 7, "got [klingon]"),
    ("generation:\n  exponential_decay_length_penalty: [1]\n", 7, "generation.exponential_decay_length_penalty"),
    ("tracking:\n  report_to: tensorboard\n", 7, "write a list: [tensorboard]"),
    ("tracking:\n  report_to: [mlflow]\n", 7, "got [mlflow]"),
    ("runtime:\n  device: tpu\n", 7, "one of auto, cpu, cuda, cuda:<number>"),
    ("runtime:\n  device: cuda:-1\n", 7, "cuda:<number>"),
    ("experiment:\n  notes: 5\n", 7, "put it in quotes"),
    # names and paths
    ("experiment:\n  name: ../x\n", 7, "experiment.name must be 1 to 64 letters"),
    ("experiment:\n  name: /tmp/x\n", 7, "experiment.name must be"),
    ("experiment:\n  name: .hidden\n", 7, "not starting with a dot"),
    ("experiment:\n  name: a b\n", 7, "experiment.name must be"),
    ("experiment:\n  name: 'x\\n'\n", 7, "experiment.name must be"),
    ('experiment:\n  name: "x\\n"\n', 7, "experiment.name must be"),
    (f"experiment:\n  name: {'x' * 300}\n", 7, "experiment.name must be"),
    ("experiment:\n  name: ''\n", 7, "experiment.name must be"),
    ('experiment:\n  name: "a\\0b"\n', 7, "NUL"),
    ('experiment:\n  output_dir: "a\\0b"\n', 7, "NUL"),
    ('experiment:\n  notes: "\\ud800"\n', 7, "broken character"),
    ("experiment:\n  output_dir: ''\n", 7, "is no usable path"),
    (f"experiment:\n  output_dir: {'x' * 300}\n", 7, "is no usable path"),
    ("experiment:\n  output_root: s3://bucket/x\n", 7, "must be a local path"),
    # what YAML allows and recipes do not
    ("training:\n  seed: 1\n  seed: 2\n", 8, "training.seed is given twice (first on line 7)"),
    ("training: &t\n  seed: 1\n", 6, "anchor &t is refused"),
    ("training: *t\n", 6, "alias *t is refused"),
    ("training:\n  <<: {seed: 1}\n", 7, "merge key << is refused"),
    ("training: !!python/object/apply:os.system ['true']\n", 6, "tag"),
    ("training:\n  seed: !!int 5\n", 7, "tag"),
    ("training:\n  seed: ! 5\n", 7, "tag"),
    ("training:\n  ? [a]\n  : 1\n", 7, "a key must be plain text"),
    ("--- \nx: 1\n", 6, "one YAML document"),
    ("training:\n\tseed: 1\n", 7, "not valid YAML"),
    ("training:\n  seed: 'open\n", 7, "not valid YAML"),
    ("training:\n  seed: [1, 2\n", 7, "not valid YAML"),
    ("training:\n  seed: 1\n seed: 2\n", 8, "not valid YAML"),
    ("training: seed: 1\n", 6, "not valid YAML"),
    ("training:\n  seed: @x\n", 7, "not valid YAML"),
    ("training:\n  seed: \x07\n", 7, "not valid YAML"),
    # rules between sections
    ("evaluation:\n  generate: false\n", 7, "is rouge_sum, which generate: false does not produce"),
    ("evaluation:\n  generate: false\n  metric: rouge1\n", 8, "is rouge1, which generate: false does not produce"),
    ("evaluation:\n  strategy: steps\n", 7, "needs evaluation.steps"),
    ("evaluation:\n  steps: 5\n", 7, "has no effect while evaluation.strategy is epoch"),
    ("checkpoint:\n  strategy: steps\n", 7, "needs checkpoint.steps"),
    ("evaluation:\n  strategy: no\ntraining:\n  early_stopping_patience: 3\n", 9, "needs evaluations"),
    ("quantization:\n  load_in_4bit: true\nlora:\n  enabled: false\n", 7, "needs adapters to train"),
    ("lora:\n  use_dora: true\n", 7, "has no effect while no adapter is trained"),
    ("lora:\n  modules_to_save: [lm_head]\n", 7, "has no effect while no adapter is trained"),
    ("prompt:\n  prefix: x\n  style: instruction\n", 7, "belongs to the plain style"),
    ("prompt:\n  style: template\n", 7, "prompt.template is missing"),
    ("prompt:\n  style: template\n  template: 'x {dialog}'\n", 8, "names {dialog}; there are {dialogue}"),
    ("prompt:\n  style: template\n  template: '{topic} {dialogue}'\n", 8, "set data.topic_column"),
    ("evaluation:\n  extra_metrics: [bertscore]\n", 7, "evaluation.bertscore_model is missing"),
    ("evaluation:\n  extra_metrics: [os.system]\n", 7, "installed code as module:function; got [os.system]"),
    ("evaluation:\n  extra_metrics: ['a:f', 'b:f']\n", 7, "names two metrics alike"),
    ("evaluation:\n  metric: max:bertscore\n", 7, "add it to evaluation.extra_metrics"),
    ("evaluation:\n  bertscore_layer: 9\n", 7, "has no effect without bertscore"),
    ("data2:\n  instruction_augmentation: true\n", 6, "did you mean data?"),
    ("generation:\n  min_new_tokens: 60\n  max_new_tokens: 50\n", 7, "above the most new tokens, 50"),
    ("generation:\n  min_new_tokens: 500\n", 7, "above the most new tokens, 128"),
    ("generation:\n  min_length: 60\n  max_length: 50\n", 7, "above generation.max_length, 50"),
    ("generation:\n  num_return_sequences: 5\n", 7, "above generation.num_beams, 4"),
    ("generation:\n  block_scripts: [han]\n  allow_scripts: [hangul]\n", 7, "exclude each other"),
    ("generation:\n  allow_scripts: []\n", 7, "allows nothing"),
    ("generation:\n  temperature: 0.7\n", 7, "has no effect without generation.do_sample"),
    ("generation:\n  top_p: 1.7\n", 7, "at most 1"),
    ("training:\n  precision: fp16\nruntime:\n  device: cpu\n", 7, "which CPUs run as fp32"),
    ("training:\n  optim: paged_adamw_8bit\nruntime:\n  device: cpu\n", 7, "needs CUDA"),
    ("training:\n  lr_scheduler_type: constant\n  warmup_steps: 5\n", 7, "has no warm-up"),
    ("tokenizer:\n  added_tokens: [a, a]\n", 7, "empty or repeated token"),
    ("tokenizer:\n  added_tokens: ['']\n", 7, "empty or repeated token"),
]  # fmt: skip

# (overrides, what the line must say)
BAD_OVERRIDES = [
    (["training.seed"], "is not section.key=value"),
    ([""], "is not section.key=value"),
    (["=5"], "is not section.key=value"),
    (["training.=5"], "is not section.key=value"),
    ([".seed=5"], "is not section.key=value"),
    (["--resume"], "is not section.key=value"),
    (["seed=5"], "did you mean training.seed?"),
    (["batch_size=5"], "did you mean training.per_device_train_batch_size?"),
    (["base=other.yaml"], "names no section"),
    (["base.x=other.yaml"], "belongs into a recipe file"),
    (["training.seed="], "has no value; write null"),
    (["training.seed=1", "training.seed=2"], "is given twice"),
    (["model.config={a: 1}", "model.config.a=2"], "is given twice"),
    (["training.seed=abc"], "a whole number at least 0; got 'abc'"),
    (["training.seed='5'"], "write it without quotes"),
    (["training.seed.x=5"], "training.seed must be"),
    (["training={seed: 5}"], "names no section"),
    (["training.seed=[1"], "not valid YAML"),
    (["training.seed={a: &x 1}"], "anchor &x is refused"),
    (["training.seed=[!!int 5]"], "tag"),
    (["lora.target_modules=q_proj"], "a list, each item text or one of all-linear, auto"),
    (["lora.target_modules=[1]"], "got [1]"),
    (["model.config=5"], "a mapping or null; got 5"),
    (["model.config.auto_map={AutoModel: x.Y}"], "model.config.auto_map is refused"),
    (["model.config._attn_implementation=evil/kernel"], "is refused: a recipe chooses no code"),
    (["model.config.x=.inf"], "must be a finite number"),
    (["model.trust_remote_code=true"], "needs model.revision as a full commit of 40 hex digits"),
    (["model.trust_remote_code=true", "model.revision=main"], "needs model.revision as a full commit"),
    (["model.name_or_path=null"], "model.name_or_path is missing"),
    (["model.name_or_path=https://host/model"], "is not a hub id or a local folder"),
    (["model.init=random", "model.name_or_path=null", "tokenizer.name_or_path=x"], "needs model.config with a model_type"),
    (["model.init=random", "model.name_or_path=null", "model.config.model_type=bart"], "without a tokenizer"),
    (["model.name_or_path=paust/pko-t5-base", "training.precision=fp16"], "T5 models overflow"),
    (["model.name_or_path=google/mt5-small", "training.precision=fp16"], "T5 models overflow"),
    (["model.config.model_type=t5", "training.precision=fp16"], "T5 models overflow"),
    (["model.family=seq2seq", "prompt.style=chat"], "encoder-decoders have no template"),
    (["model.name_or_path=digit82/kobart-summarization", "prompt.style=chat"], "encoder-decoders have no template"),
    (["data.instruction_augmentation=true"], "needs instructions"),
    (["data.train_file=null"], "data.train_file is missing"),
    (["data.validation_file=null"], "data.validation_file is missing"),
    (["data.train_file=https://host/train.csv"], "must be a local path"),
    (["data.on_bad_row=skip"], "needs a cap"),
    (["data.summary_column=dialogue"], "need names, each its own"),
    (["data.summary_column=[]"], "need names, each its own"),
    (["data.tokens_per_batch=4096"], "has no effect while data.batching is length; set it to tokens"),
    (["data.batching=tokens", "training.auto_batch_size=true"], "lower data.tokens_per_batch instead"),
    (["evaluation.strategy=no", "evaluation.steps=3"], "has no effect while evaluation.strategy is no"),
    (["evaluation.strategy=never"], "one of epoch, steps, no; got 'never'"),
    (["evaluation.metric=rouge_sum", "evaluation.generate=false"], "does not produce"),
    (["training.learning_rate=1e38"], "is 1e+38, beyond the float32"),
    (["generation.do_sample=maybe"], "true or false; got 'maybe'"),
    (["experiment.name=../../etc"], "experiment.name must be"),
]  # fmt: skip


def test_the_corpus_is_large() -> None:
    assert len(BAD_TEXT) + len(BAD_OVERRIDES) >= 150


def lines_of(path: Path, overrides=(), **kwargs) -> list[str]:
    with pytest.raises(EngineError) as caught:
        load_recipe(path, overrides, **kwargs)
    assert caught.value.exit_code == 2 and caught.value.__cause__ is None
    lines = str(caught.value).splitlines()
    assert len(str(caught.value)) < 2000 and "Traceback" not in str(caught.value)
    return lines


@pytest.mark.parametrize(("text", "line", "says"), BAD_TEXT)
def test_bad_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + text, encoding="utf-8")
    found = [row for row in lines_of(path) if says in row]
    assert found, lines_of(path)
    assert found[0].split(": ")[1] == f"r.yaml:{line}", found


@pytest.mark.parametrize(("overrides", "says"), BAD_OVERRIDES)
def test_bad_overrides(tmp_path: Path, overrides: list[str], says: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(HEAD, encoding="utf-8")
    lines = lines_of(path, overrides)
    assert len(lines) == 1, lines
    assert says in lines[0] and lines[0].split(": ")[1] == "command line", lines


BAD_VALUES = [object(), {1, 2, object()}, b"x", float("nan"), lambda: 0, Path, 1j]


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda value: type(value).__name__)
def test_bad_values_from_python(tmp_path: Path, value: object) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(HEAD, encoding="utf-8")
    for key in ("training.seed", "model.config.x", "experiment.notes"):
        assert all(key.rpartition(".")[0] in line for line in lines_of(path, {key: value}))
    assert "names no section" in lines_of(path, {"seed": value})[0]


def test_a_key_of_the_same_section_is_suggested_first(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {name: foo, path: bar}\nevaluation: {batch_size: 4}\ncheckpoint: {limit: 2}\n", encoding="utf-8"
    )
    said = "\n".join(lines_of(path))
    assert said.count("did you mean model.name_or_path?") == 2
    assert "did you mean evaluation.per_device_eval_batch_size?" in said
    assert "did you mean checkpoint.save_total_limit?" in said


def test_a_missing_base_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "r.yaml").write_text("base: recipes/base/seq2seq.yaml\n", encoding="utf-8")
    line = lines_of(Path("recipes/r.yaml"))[0]
    assert f"looked for {tmp_path}/recipes/recipes/base/seq2seq.yaml" in line and "r.yaml:1" in line
    assert "relative to the file that names it" in line and "ls recipes" not in line


# --- files that are no recipes ---------------------------------------------------------------------------------------


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = {
        "missing.yaml": (None, "does not exist"),
        "empty.yaml": (b"", "a recipe is a mapping of sections"),
        "comment.yaml": (b"# nothing\n", "a recipe is a mapping of sections"),
        "list.yaml": (b"- a\n", "a recipe is a mapping of sections"),
        "text.yaml": (b"hello\n", "a recipe is a mapping of sections"),
        "cp949.yaml": ("experiment:\n  notes: 요약\n".encode("cp949"), "cp949.yaml:2: is not UTF-8"),
        "utf16.yaml": ("model: {}\n".encode("utf-16"), "is not UTF-8"),
        "binary.yaml": (bytes(range(256)), "is not UTF-8"),
        "nul.yaml": (b"a: \0\n", "not valid YAML"),
        "large.yaml": (b"# x\n" * 300_000, "larger than 1048576 bytes"),
        "directive.yaml": (b"%YAML 1.1\n---\na: 1\n", "directives"),
        "two.yaml": (b"model: {}\n---\ndata: {}\n", "one YAML document"),
    }
    for name, (content, says) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        lines = lines_of(Path(name))
        assert says in lines[0] and name in lines[0], (name, lines)
    (tmp_path / "folder.yaml").mkdir()
    assert "not a regular file" in lines_of(tmp_path / "folder.yaml")[0]
    assert "holds a NUL" in lines_of(Path("nul\0name.yaml"))[0]
    assert "E2.1" in lines_of(Path("x" * 5000 + ".yaml"))[0]


def test_devices_and_pipes_are_not_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    assert "not a regular file" in lines_of(tmp_path / "pipe.yaml")[0]
    assert "not a regular file" in lines_of(Path("/dev/zero"))[0]


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("nowhere.yaml", "base {folder}/nowhere.yaml does not exist"),
        ("r.yaml", "base files form a cycle: r.yaml -> r.yaml"),
        ("other.yaml", "base files form a cycle: r.yaml -> other.yaml -> r.yaml"),
        ("folder.yaml", "is not a regular file"),
        ("https://host/base.yaml", "needs a local .yaml file"),
        ("secrets.txt", "needs a local .yaml file"),
        ("5", "needs a local .yaml file"),
        ("[]", "needs a local .yaml file"),
        ("[other2.yaml, 7]", "needs a local .yaml file"),
        ("{a: b}", "needs a local .yaml file"),
        ("broken.yaml", "broken.yaml:2: is not valid YAML"),
        ("wrong.yaml", "wrong.yaml:2: training.sed is not a key"),
    ],
)
def test_bad_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "other.yaml").write_text("base: r.yaml\n")
    (tmp_path / "broken.yaml").write_text("a: 1\nb: [\n")
    (tmp_path / "wrong.yaml").write_text("training:\n  sed: 1\n")
    (tmp_path / "r.yaml").write_text(f"base: {base}\n{HEAD}")
    lines = lines_of(tmp_path / "r.yaml")
    assert says.format(folder=tmp_path) in lines[0], lines
    if "cycle" not in says and "broken" not in base and "wrong" not in base:
        assert "r.yaml:1: " in lines[0]


def test_a_long_chain_of_bases_ends(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"{index}.yaml").write_text(f"base: {index + 1}.yaml\n")
    (tmp_path / "40.yaml").write_text(HEAD)
    assert "more than 16 base files in a row" in lines_of(tmp_path / "0.yaml")[0]

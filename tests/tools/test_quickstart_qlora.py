"""The QLoRA quickstart: a tiny Llama in full, 4-bit adapters on it, prediction from the adapter folder alone, merging."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs

sys.path.insert(0, str(runs.ROOT / "tools"))
import merge_adapter
import quickstart_qlora_report as report

pytestmark = pytest.mark.slow

RECIPES = runs.ROOT / "recipes"
TEST = RECIPES / "quickstart" / "test.csv"
SHORT = [
    *("data.max_train_samples=48", "data.max_validation_samples=6", "data.max_test_samples=4"),
    *("training.num_train_epochs=1", "generation.max_new_tokens=8"),
]


def chain(folder: Path, test: Path, short: bool) -> SimpleNamespace:
    """What tools/quickstart_qlora.sh does, in this process."""
    from engine import predict

    quiet = [f"data.test_file={test}", "tracking.progress=false", f"experiment.output_root={folder / 'experiments'}"]
    base, qlora = folder / "base", folder / "qlora"
    changes = quiet + (SHORT if short else [])
    runs.train(RECIPES / "quickstart_llama.yaml", *changes, f"experiment.output_dir={base}")
    model = f"model.name_or_path={base / 'final_model'}"
    runs.train(RECIPES / "quickstart_qlora.yaml", *changes, model, f"experiment.output_dir={qlora}")

    shutil.copytree(qlora / "final_model", folder / "adapter")
    shutil.copytree(qlora / "final_model", folder / "unquantised")
    (folder / "unquantised" / "base_model.json").unlink()
    merge_adapter.merge(qlora / "final_model", folder / "merged")
    files = {}
    for name in ("adapter", "unquantised", "merged"):
        files[name] = folder / f"{name}.csv"
        assert predict.main([str(folder / name), "--input", str(test), "--output", str(files[name])]) == 0
    return SimpleNamespace(folder=folder, base=base, qlora=qlora, files=files)


def hold_against_contract(run_dir: Path) -> None:
    check = runs.ROOT.parent / "shared" / "checks" / "check_run.py"
    if check.is_file():
        done = subprocess.run([sys.executable, str(check), str(run_dir)], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "contract holds", done.stdout


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three updates of each training."""
    folder = tmp_path_factory.mktemp("chain")
    test = folder / "test.csv"
    rows = TEST.read_text(encoding="utf-8").split("\ntest_4,")[0]  # the header and four rows
    test.write_text(rows + "\n", encoding="utf-8")
    return chain(folder, test, short=True)


def test_chain_keeps_the_contract(short: SimpleNamespace) -> None:
    for run, updates in ((short.base, 3), (short.qlora, 3)):
        hold_against_contract(run)
        assert len(runs.rows_of(run)) and runs.rows_of(run)[-1]["step"] == updates
        assert [row["step"] for row in report.dev_evaluations(run)] == [updates]


def test_adapter_folder_alone_predicts_what_its_run_predicted(short: SimpleNamespace) -> None:
    (during,) = (short.qlora / "predictions").glob("test-step*.csv")
    assert report.agreement(during, short.files["adapter"]) == (4, 4)


def test_merged_model_writes_the_same_text(short: SimpleNamespace) -> None:
    assert report.agreement(short.files["merged"], short.files["unquantised"]) == (4, 4)


def test_folders_load_without_this_package_and_give_the_same_logits(short: SimpleNamespace) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = AutoPeftModelForCausalLM.from_pretrained(short.qlora / "final_model").eval()
    merged = AutoModelForCausalLM.from_pretrained(short.folder / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(short.folder / "merged")
    batch = tokenizer("#Person1#: 내일 몇 시에 볼까?\n#Person2#: 세 시에 보자.", return_tensors="pt")
    ids = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        torch.testing.assert_close(adapter(**ids).logits, merged(**ids).logits, atol=1e-4, rtol=1e-4)


def test_report_sets_base_and_adapter_side_by_side(short: SimpleNamespace, monkeypatch, capsys) -> None:
    files = [part for name, file in short.files.items() for part in ("--predictions", name, str(file))]
    references = ["--references", str(short.folder / "test.csv")]
    monkeypatch.setattr(sys, "argv", ["report", str(short.base), str(short.qlora), *files, *references])
    assert report.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["base", "QLoRA"] and "<- best" in lines[2]
    assert lines[-1].startswith("  merged") and lines[-3].endswith("4 of 4")


def test_script_is_sound() -> None:
    script = runs.ROOT / "tools" / "quickstart_qlora.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK) == os.access(runs.ROOT / "tools" / "quickstart.sh", os.X_OK)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FULL_TESTS"), reason="minutes of training; set FULL_TESTS=1")
def test_adapters_improve_on_their_base(tmp_path: Path) -> None:
    done = chain(tmp_path, TEST, short=False)
    for run in (done.base, done.qlora):
        hold_against_contract(run)
    base, qlora = (report.best(run)["rouge_mean"] for run in (done.base, done.qlora))
    assert base > 80 and qlora > base + 1, (base, qlora)
    (during,) = (done.qlora / "predictions").glob("test-step*.csv")
    assert report.agreement(during, done.files["adapter"])[0] == 100
    # Merging adds in another order, so that one near-tie of beams in a hundred texts may fall the other way.
    assert report.agreement(done.files["merged"], done.files["unquantised"])[0] >= 99

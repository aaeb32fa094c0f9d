"""Every test runs offline, on few threads and from a fixed seed; real data is used where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

# Before transformers or a launcher's child is imported: no hub, no chatter, no thread storms on small machines.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TRANSFORMERS_VERBOSITY="error",
)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; deterministic runs on a GPU need it
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import random
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def gpu():
    """The device of tests marked `gpu`. TEST_DEVICE=cpu runs them without one, which proves no more than that they run."""
    import torch

    device = torch.device(os.environ.get("TEST_DEVICE", "cuda:0"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real dialogues and tokenizers beside the checkout; tests that need them skip where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data beside the checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of a tiny Bart: two epochs, with a test split and TensorBoard. Read it, or copy it and write there."""
    import runs
    import tiny

    folder = tmp_path_factory.mktemp("trained")
    test = tiny.write_rows(folder / "test.jsonl", 5)
    recipe = runs.write_recipe(
        folder,
        training__num_train_epochs=2,
        data__test_file=str(test),
        tracking__report_to=["tensorboard"],
        checkpoint__save_total_limit=1,
    )
    results = runs.train(recipe)
    return folder, results


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that modules are imported from, as an installed package's is."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Half characters that a test logs on purpose cannot be sent from a worker of pytest-xdist: they go escaped."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers for each test, whichever tests ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)

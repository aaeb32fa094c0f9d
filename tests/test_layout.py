"""The house rules that a program can check: names, imports, start-up time, lint."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "engine").rglob("*.py"))
ENTRIES = {"engine.train", "engine.predict"}  # scripts; rooms do not import them
PURE = ("losses", "scoring", "prompts", "batching", "generation")  # plain arguments: no files, no recipe, no Accelerate
HEAVY = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "pandas", "pydantic", "numpy"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_no_module_is_named_like_an_installed_one() -> None:
    """`accelerate launch engine/train.py` puts engine/ first on the path: engine/logging.py would replace logging."""
    taken = set(sys.stdlib_module_names) | set(sys.builtin_module_names)
    installed = {name for name, owners in metadata.packages_distributions().items() if owners != ["ko-dialogue-engine"]}
    known = {"datasets", "evaluate", "peft", "wandb", "rouge", "trl"}  # not installed here, perhaps elsewhere
    names = {path.stem for path in (ROOT / "engine").glob("*.py")} | {
        path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")
    }
    assert len(names) > 10
    assert not names & (taken | installed | known) - {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_no_entry_script(path: Path) -> None:
    assert not imports(path) & ENTRIES
    assert not any(name.startswith(".") for name in imports(path)), (
        "absolute imports, so that a room moves with its name"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pure_rooms_stay_pure(path: Path) -> None:
    if path.relative_to(ROOT / "engine").parts[0].removesuffix(".py") in PURE:
        used = {
            name.split(".")[0] if not name.startswith("engine.") else ".".join(name.split(".")[:2])
            for name in imports(path)
        }
        assert not used & {"accelerate", "pathlib", "io", "csv", "yaml", "engine.recipe", "engine.errors"}, path


def test_there_are_no_import_cycles() -> None:
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = top_level_imports(tree)

    def visit(name: str, chain: tuple[str, ...]) -> None:
        assert name not in chain, " -> ".join((*chain, name))
        for target in sorted(graph.get(name, ())):
            visit(target, (*chain, name))

    graph = {name: {target for target in targets if target in graph} - {name} for name, targets in graph.items()}
    for name in graph:
        visit(name, ())


def top_level_imports(tree: ast.Module) -> set[str]:
    """What is imported when the module is: neither inside functions nor for type checkers only."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{name.name}" for name in node.names}
            modules = {name for name in inner if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()}
            found |= modules or {node.module}  # `from package import room` needs the room, not what the package gathers
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_importing_the_package_is_free() -> None:
    done = run(f"import sys, engine; print(sorted(set(sys.modules) & {HEAVY!r})); print(dir(engine))")
    assert done.stdout.startswith("[]") and "load_recipe" in done.stdout, done.stderr


def test_load_recipe_does_not_need_torch() -> None:
    done = run(
        "import sys; from engine import load_recipe; load_recipe('recipes/quickstart.yaml');"
        f"print(sorted(set(sys.modules) & {HEAVY - {'pydantic'}!r}))"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_names_of_the_package_are_attribute_errors() -> None:
    import engine

    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        engine.Trainer  # noqa: B018


@pytest.mark.parametrize("script", ["train", "predict"])
def test_help_loads_nothing_heavy(script: str) -> None:
    """--help answers within a second: counted in modules, because clocks of busy machines lie."""
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done:\n    assert not done.code, done.code\n"
        f"print('HEAVY', sorted(set(sys.modules) & {HEAVY!r}), len(sys.modules))\n"
    )
    done = run(code, f"engine/{script}.py")
    heavy, count = done.stdout.splitlines()[-1].removeprefix("HEAVY ").rsplit(" ", 1)
    assert done.returncode == 0 and heavy == "[]" and int(count) < 400, (done.stdout[-500:], done.stderr[-500:])
    assert "usage:" in done.stdout and "section.key=value" in done.stdout or "generation.key=value" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["recipes/nowhere.yaml"], ["recipes/kobart.yaml", "training.lr=1", "experiment.name=../x"]]
)
def test_a_bad_recipe_ends_with_code_2_and_no_traceback(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "engine/train.py", *arguments, f"experiment.output_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error E2.")]
    assert len(lines) == max(1, len(arguments) - 1), done.stderr  # one for each bad override, or for the missing file
    assert not (tmp_path / "run").exists(), "nothing is made before the recipe is known to be good"


def test_the_code_is_clean() -> None:
    ruff = pytest.importorskip("ruff")
    program = ruff.find_ruff_bin() if hasattr(ruff, "find_ruff_bin") else str(Path(sys.executable).with_name("ruff"))
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([program, *command], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

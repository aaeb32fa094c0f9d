"""The house rules that a program can check: names, imports, start-up time, lint."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "engine").rglob("*.py"))
ENTRIES = {"engine.train", "engine.predict"}  # scripts; rooms do not import them
# Plain arguments only: no files, no recipe, no Accelerate. A folder counts with all its rooms.
PURE = ("generation", "scoring", "data/prompts.py", "data/windows.py", "loss")
# Packages, lowest first: a room imports from its own package and from those before it, never from one after it.
FLOORS = (
    "recipe runtime data scoring reporting generation loss checkpoints models prediction evaluation training".split()
)
HEAVY = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "pandas", "pydantic", "numpy"}


@cache
def parsed(path: Path) -> ast.Module:
    """Parsed once for all rules."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(parsed(path)):
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


@pytest.mark.parametrize("name", PURE)
def test_pure_rooms_stay_pure(name: str) -> None:
    rooms = [path for path in MODULES if path.relative_to(ROOT / "engine").as_posix().startswith(name)]
    assert rooms, f"engine/{name} has moved: name it anew"
    for path in rooms:
        used = {name if name.startswith("engine.") else name.split(".")[0] for name in imports(path)}
        barred = {"accelerate", "pathlib", "io", "csv", "yaml", "engine.errors"}
        assert not used & barred and not any(name.startswith("engine.recipe") for name in used), path


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def engine_imports(node: ast.AST) -> set[str]:
    """Rooms of the engine that are imported anywhere below `node`, inside functions too; not those for type checkers only."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "engine":
            inner = {f"{child.module}.{name.name}" for name in child.names}
            rooms = {name for name in inner if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()}
            found |= rooms or {child.module}  # `from package import room` needs the room, not the package
        found |= engine_imports(child)
    return found


GRAPH = {module_of(path): engine_imports(parsed(path)) for path in MODULES}


def test_there_are_no_import_circles() -> None:
    assert sum(map(len, GRAPH.values())) > 100, "the graph is nearly empty: it no longer sees the imports"
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        assert name not in chain, " -> ".join((*chain, name))
        for target in sorted(GRAPH.get(name, set()) - done):
            visit(target, (*chain, name))
        done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_no_arrow_points_upward() -> None:
    for name, targets in GRAPH.items():
        floor = FLOORS.index(name.split(".")[1]) if name.count(".") > 1 else len(FLOORS)
        packages = {target.split(".")[1] for target in targets if target.count(".") > 1}
        above = {package for package in packages if FLOORS.index(package) > floor}
        assert not above or name in ENTRIES, f"{name} imports from {above}"
    assert {path.parent.name for path in MODULES if path.parent != ROOT / "engine"} == set(FLOORS)


def defined(path: Path) -> set[str]:
    """Names that a file itself makes: functions, classes, assignments; not what it imports."""
    names: set[str] = set()
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def test_names_are_imported_from_where_they_are_defined() -> None:
    """No re-exports, in the tools and the tests neither. `engine/__init__.py` alone hands out names, as the contract has it."""
    homes = {module_of(path): defined(path) for path in MODULES}
    checked = 0
    for path in [*MODULES, *(ROOT / "tools").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module in homes and node.module != "engine":
                strangers = {name.name for name in node.names} - homes[node.module]
                rooms = {name for name in strangers if f"{node.module}.{name}" in homes}
                assert not strangers - rooms, f"{path}: {node.module} does not define {strangers - rooms}"
                checked += 1
    assert checked > 200


NESTING = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def depth_of(node: ast.AST, depth: int = 0) -> int:
    """Blocks within blocks; an `elif` is no deeper than its `if`, and what an inner function does is its own."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        children = [child for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)]
        chained = (
            isinstance(node, ast.If) and name == "orelse" and len(children) == 1 and isinstance(children[0], ast.If)
        )
        for child in children:
            if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
                deepest = max(deepest, depth_of(child, depth + (isinstance(child, NESTING) and not chained)))
    return deepest


def test_rooms_and_functions_stay_small() -> None:
    """At most 450 lines a file, 2,500 a package, 60 lines and three blocks deep a function."""
    packages: dict[str, int] = {}
    functions = 0
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        packages[path.parent.name] = packages.get(path.parent.name, 0) + lines
        assert lines <= 450, f"{path}: {lines} lines"
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                functions += 1
                length, depth = node.end_lineno - node.lineno + 1, depth_of(node)
                assert length <= 60 and depth <= 3, f"{path}: {node.name}: {length} lines, {depth} blocks deep"
    assert max(packages.values()) <= 2500, packages
    assert functions > 500


def test_nothing_is_written_twice() -> None:
    """No six lines of code stand in two places of the engine; imports, comments and lone brackets do not count."""
    seen: dict[tuple[str, ...], str] = {}
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        skipped = {
            number
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for number in range(node.lineno, node.end_lineno + 1)
        }
        code = [
            (number, line.strip())
            for number, line in enumerate(text.splitlines(), start=1)
            if number not in skipped and len(line.strip()) > 2 and not line.lstrip().startswith("#")
        ]
        for start in range(len(code) - 5):
            window = tuple(line for _, line in code[start : start + 6])
            place = f"{path}:{code[start][0]}"
            assert window not in seen, f"{place} repeats {seen[window]}"
            seen[window] = place
    assert len(seen) > 5000


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

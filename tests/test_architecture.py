"""The rules of the house (docs/architecture.md), read from the syntax of every file."""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_jam"
FLOORS = {
    "_C": 0,
    "config": 0,  # imports nothing of ours: everybody's errors, logger and settings
    **dict.fromkeys(["tokenizers", "ops"], 1),
    "parallel": 2,
    **dict.fromkeys(["models", "data"], 3),
    **dict.fromkeys(["weights", "planning"], 4),
    **dict.fromkeys(["fusion", "training", "generation"], 5),
    "evaluation": 6,
    "train": 7,
    "tools": 8,
    **dict.fromkeys(["examples", "benchmarks"], 9),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

PYTHON = sorted(
    path
    for folder in (PACKAGE, "tools", "examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NATIVE = sorted(
    path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}
)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def room(path: Path) -> str:
    """The folder (or module) of the floors' table that a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Dotted names that a file imports, those of `from a import b` as a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node, f"{base}.{name.name}") for name in node.names)


def uses(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Imported names and dotted names in expressions, such as torch.cuda.synchronize."""
    yield from imports(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            yield node, ast.unparse(node)


def is_under(name: str, *roots: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def report(violations: list[str], lesson: str) -> None:
    assert not violations, f"{lesson}\n  " + "\n  ".join(violations)


def test_imports_go_down_only() -> None:
    violations = []
    for path in PYTHON:
        source = room(path)
        if source == "__init__":
            continue
        for node, name in imports(path):
            parts = name.split(".")
            if name.startswith("."):
                violations.append(f"{place(path, node)}: relative import; write the full name")
                continue
            if parts[0] not in (PACKAGE, "tools", "examples", "benchmarks"):
                continue
            target = parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]
            if target in FLOORS and target != source and FLOORS[target] >= FLOORS[source]:
                violations.append(
                    f"{place(path, node)}: {source} (floor {FLOORS[source]}) imports "
                    f"{target} (floor {FLOORS[target]})"
                )
    report(
        violations,
        "A module imports from lower floors, and on its own floor from its own folder alone. Move "
        "what both need down, or take it as an argument or a callback:",
    )


def test_every_folder_has_a_floor() -> None:
    strangers = {room(path) for path in PYTHON} - {"__init__"} - FLOORS.keys()
    report(sorted(strangers), "Give these a floor in docs/architecture.md and in FLOORS:")


@pytest.mark.parametrize("path", PYTHON + TESTS + NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, (
        f"{path.relative_to(ROOT)} has {num_lines} lines; split it at {MAX_FILE_LINES} by what its "
        "parts are for"
    )
    functions = python_functions(path) if path.suffix == ".py" else native_functions(path)
    report(
        [
            f"{path.relative_to(ROOT)}:{first}: {last - first + 1} lines"
            for first, last in functions
            if last - first >= MAX_FUNCTION_LINES
        ],
        f"A function has at most {MAX_FUNCTION_LINES} lines; give its steps names:",
    )


def python_functions(path: Path) -> Iterator[tuple[int, int]]:
    """First and last line of each function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.end_lineno


def native_functions(path: Path) -> Iterator[tuple[int, int]]:
    """First and last line of each braced block whose head has parentheses (functions, loops)."""
    text = re.sub(r'//[^\n]*|"(?:\\.|[^"\\\n])*"', "", path.read_text(encoding="utf-8"))
    text = re.sub(  # lines of the preprocessor
        r"^[ \t]*#(?:[^\n\\]|\\.|\\\n)*", lambda cut: "\n" * cut[0].count("\n"), text, flags=re.M
    )
    blocks: list[int | None] = []
    head, head_line, line = "", 1, 1
    for character in text:
        line += character == "\n"
        if character == "{":
            is_scope = re.match(r"\s*(namespace|struct|class|enum|extern)\b", head)
            blocks.append(head_line if "(" in head and not is_scope else None)
        elif character == "}" and (first := blocks.pop()) is not None:
            yield first, line
        if character in "{};":
            head = ""
        elif head or not character.isspace():
            head_line = head_line if head else line
            head += character


def test_package_does_not_print() -> None:
    violations = [
        place(path, node)
        for path in PYTHON
        if path.is_relative_to(ROOT / PACKAGE)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    report(violations, "Use `from megatron_jam.config.log import logger` in place of print:")


@pytest.mark.parametrize(
    ("names", "allowed", "lesson"),
    [
        (
            ["torch.cuda"],
            ["megatron_jam/parallel", "megatron_jam/ops"],
            "Ask parallel/ for the device, or take it as an argument; torch.cuda stands nowhere "
            "else, so that everything runs on a CPU:",
        ),
        (
            ["megatron.core.parallel_state", "megatron.core.mpu"],
            ["megatron_jam/parallel"],
            "Process groups are built in parallel/ and handed down; take them as an argument:",
        ),
        (
            ["megatron.training", "megatron.legacy"],
            [],
            "Build on megatron.core; megatron.training is global arguments and global state:",
        ),
        (
            ["pickle", "cPickle", "dill", "cloudpickle", "joblib", "torch.load", "torch.save"],
            # The benchmark makes a file of the other program.
            ["megatron_jam/weights/metaseq/pickles.py", "benchmarks/convert.py"],
            "Write safetensors, JSON or .bin/.idx; a pickle runs code when read, and only "
            "weights/metaseq/pickles.py reads one, through an allow-list:",
        ),
    ],
    ids=["torch.cuda", "parallel_state", "megatron.training", "pickle"],
)
def test_names_stand_where_they_belong(names: list[str], allowed: list[str], lesson: str) -> None:
    violations = {
        f"{place(path, node)}: {name}"
        for path in PYTHON
        if not any(path.is_relative_to(ROOT / folder) for folder in allowed)
        for node, name in uses(path)
        if is_under(name, *names)
    }
    report(sorted(violations), lesson)


def test_init_files_hold_names_only() -> None:
    violations = [
        place(path, node)
        for path in PYTHON
        if path.name == "__init__.py"
        for node in tree(path).body
        if not isinstance(node, ast.Import | ast.ImportFrom)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("__"))
    ]
    report(violations, "An __init__.py holds a docstring and names; move code into a module:")


@pytest.mark.parametrize(
    "name",
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PYTHON
        if path.is_relative_to(ROOT / PACKAGE) or path.is_relative_to(ROOT / "tools")
    ],
)
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for path in PYTHON if path.is_relative_to(ROOT / PACKAGE)}
    missing = [
        str(folder.relative_to(ROOT))
        for folder in sorted(folders)
        if not (folder / "__init__.py").exists()
    ]
    report(missing, "Installed without an __init__.py these would be left out:")

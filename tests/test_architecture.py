"""The shape of the code: imports in one direction, few dependencies, short files, no trace of a workplace."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "layerwise"

# A module may import from its own level and the lower ones.
LEVELS = tuple(
    set(level.split(" ")) if level else {""}
    for level in (
        "errors memory costs finite ranks sums",
        "ops losses nn",
        "calls uses binding trainers loss_record tape coverage pull samples program replay likelihoods products chain "
        "recompute boundary separate residuals",
        "cotangents contract chunking rows views projection gradients gather blocks recursion arrivals carried heads "
        "signed layouts grams",
        "operators",
        "quantities",
        "observe passes seen joined reduction accumulate",
        "local",
        "optim",
        "monitor distributed",
        "",  # the table of contents, `layerwise/__init__.py`
        "compat demo cli __main__",
    )
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
CORE_IMPORTS = {"torch", "numpy", "layerwise"} | sys.stdlib_module_names
OUTSIDE_CORE = {"demo", "cli", "__main__"}
EXTRA_IMPORTS = {  # modules for users of another library, which nothing imports
    "layerwise.compat.laplace": {"laplace"},
    "layerwise.compat.lightning": {"lightning"},
}
MOST_CODE_LINES = 300  # neither blank, nor comment, nor docstring
MOST_LINES = 400

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted module name: `layerwise.ops.linear`."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top(module: str) -> str:
    """The part of the package that a module belongs to: `ops` for `layerwise.ops.linear`."""
    return module.split(".")[1] if "." in module else ""


@cache
def imports(path: Path) -> tuple[str, ...]:
    """All modules that a file imports, wherever it does; relative ones resolved, submodules by their name."""
    module = name_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                below = f"{base}.{alias.name}"
                found.append(below if below in MODULES else base)
    return tuple(dict.fromkeys(found))


MODULES = {name_of(path) for path in FILES}


def inner(path: Path) -> list[str]:
    """The imports of a file from within the package."""
    return [module for module in imports(path) if module.split(".")[0] == "layerwise"]


files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))


@files
def test_every_module_has_a_level(path: Path) -> None:
    assert top(name_of(path)) in LEVEL, f"give {name_of(path)} a place in LEVELS"


@files
def test_imports_point_one_way(path: Path) -> None:
    level = LEVEL[top(name_of(path))]
    upward = [module for module in inner(path) if LEVEL.get(top(module), len(LEVELS)) > level]
    assert not upward, f"{name_of(path)} (level {level}) imports from above: {upward}"


@files
def test_imported_modules_exist(path: Path) -> None:
    assert not set(inner(path)) - MODULES


def test_no_import_cycle() -> None:
    edges = {name_of(path): [m for m in inner(path) if m != name_of(path)] for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@files
def test_core_imports_only_torch_and_numpy(path: Path) -> None:
    if top(name_of(path)) in OUTSIDE_CORE:
        return
    allowed = CORE_IMPORTS | EXTRA_IMPORTS.get(name_of(path), set())
    foreign = {module.split(".")[0] for module in imports(path)} - allowed
    assert not foreign, f"the core imports {foreign}"


def test_nothing_imports_what_needs_another_library() -> None:
    importers = [name_of(path) for path in FILES if set(imports(path)) & EXTRA_IMPORTS.keys()]
    assert not importers


def code_lines(path: Path) -> int:
    """The lines that hold code: neither blank, nor comment, nor docstring."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    skip |= {tokenize.ENCODING, tokenize.ENDMARKER}
    lines: set[int] = set()
    with path.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type not in skip:
                lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            text = node.body[0]
            lines -= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len(lines)


@files
def test_files_are_short(path: Path) -> None:
    code, total = code_lines(path), len(path.read_text(encoding="utf-8").splitlines())
    assert code <= MOST_CODE_LINES, f"{path.name} has {code} lines of code: two concepts?"
    assert total <= MOST_LINES, f"{path.name} has {total} lines"


# What may not stand in any file: absolute paths of one machine, notes on how the work was organised, and
# hosts or options of package registries (plain pip is told by its own configuration where packages are).
FORBIDDEN = {
    "absolute path": r"(?<![\w.~<>)\]}-])/(?:work|home|root|opt|mnt|Users)/\w",
    "workplace note": r"\bshared/(?:spec|design|sources|hooks)\b|\bbrief\.md\b|\b(?:this|next) session\b",
    "registry host": r"\bpypi\.(?:org|python)|pythonhosted\.org|download\.pytorch\.org|anaconda\.org",
    "registry option": r"--(?:(?:extra-)?index-url|find-links|trusted-host)\b",
}


def findings(text: str) -> Iterator[str]:
    for what, pattern in FORBIDDEN.items():
        for match in re.finditer(pattern, text):
            yield f"{what}: {match.group()!r} in line {text.count(chr(10), 0, match.start()) + 1}"


def repository_files() -> list[Path]:
    """The tracked files and those that would be; without git, everything outside hidden folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        hidden = re.compile(r"(?:^|/)(?!\.ci/|\.github/)\.[^/]+/|__pycache__/|^demo/")
        below = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*"))
        found = [ROOT / name for name in below if not hidden.search(name)]
    return [path for path in found if path.is_file() and not path.is_symlink()]


def test_no_trace_of_a_workplace() -> None:
    seen, found = 0, []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content or path.suffix == ".pyc":
            continue
        seen += 1
        text = content.decode("utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {finding}" for finding in findings(text)]
    assert seen > 20, "the repository's files were not found"
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "open('" + "/".join(["", "work", "main"]) + "')",
        "see " + "/".join(["", "home", "someone", "data"]),
        "as in " + "/".join(["shared", "spec", "tape.md"]),
        "pip install " + "-" * 2 + "index-url https://x",
        "from " + ".".join(["pypi", "org"]),
    ],
)
def test_traces_are_recognised(text: str) -> None:
    assert list(findings(text))


@pytest.mark.parametrize("text", ["https://example.org/home/page", "a /root", "../shared/data", "in/work/out"])
def test_ordinary_text_is_no_trace(text: str) -> None:
    assert not list(findings(text))

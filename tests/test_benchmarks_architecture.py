"""The shape of what is beside the library: commands that exist, imports without a circle, few bytes of results."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "book", "tests", "examples")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__cache__" not in path.parts
}
TEXTS = [
    path
    for place in ("*.md", "Makefile", "pyproject.toml", "docs/**/*.md", "benchmarks/**/*", "book/*.py", "examples/*",
                  "requirements/*", "src/**/*.py", "tests/*.py", ".github/**/*", ".ci/*")
    for path in sorted(ROOT.glob(place))
    if path.suffix in {"", ".md", ".py", ".toml", ".txt", ".yml", ".json"} and path.is_file()
]  # fmt: skip
MOST_BYTES = 5_000_000  # of figures, rows and other results that the repository holds

# -- commands -------------------------------------------------------------------------------------------------------

NAMED = re.compile(r"(?<![\w/.-])benchmarks(?:\.[a-z_]\w*)+", re.ASCII)
PATH = re.compile(r"(?<![\w/.-])benchmarks/[\w/.-]*\w\.(?:py|json|jsonl|yml|md|png)\b", re.ASCII)


def is_known(name: str) -> bool:
    """Whether a dotted name is a module, or something written in one."""
    if name in MODULES:
        return True
    module, _, inner = name.rpartition(".")
    return module in MODULES and re.search(rf"\b{inner}\b", MODULES[module].read_text(encoding="utf-8")) is not None


def is_command(module: str) -> bool:
    """Whether `python -m` runs it."""
    main = MODULES.get(f"{module}.__main__") or MODULES.get(module)
    return main is not None and "__main__" in main.read_text(encoding="utf-8")


def unknown(text: str) -> list[str]:
    """What a text names of the benchmarks that does not exist."""
    commands = re.findall(r"python -m (benchmarks[\w.]*\w)", text)
    return [
        *(f"python -m {name}" for name in commands if not is_command(name)),
        *(name for name in NAMED.findall(text) if not is_known(name)),
        *(name for name in PATH.findall(text) if not (ROOT / name).exists()),
    ]


def test_every_benchmark_that_is_named_exists() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in TEXTS if path != Path(__file__)}
    assert sum("python -m benchmarks." in text for text in texts.values()) > 20
    assert {str(path.relative_to(ROOT)): lost for path, text in texts.items() if (lost := unknown(text))} == {}


def test_what_does_not_exist_is_found() -> None:
    assert unknown("benchmarks.data.load, benchmarks/data.py, requirements/benchmarks.txt, ../benchmarks.txt") == []
    assert unknown("benchmarks.no.where, benchmarks/no/where.py") == ["benchmarks.no.where", "benchmarks/no/where.py"]
    assert unknown("`python -m benchmarks.data`, `python -m benchmarks.papers.altmin`") == ["python -m benchmarks.data"]


# -- imports --------------------------------------------------------------------------------------------------------


@cache
def imports(module: str) -> tuple[str, ...]:
    """The modules beside the library that a module imports, at its top or later; tests import each other by name."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
    found = [f"tests.{name}" if f"tests.{name}" in MODULES else name for name in found]
    return tuple(name for name in dict.fromkeys(found) if name in MODULES and name != module)


def circle(edges: dict[str, tuple[str, ...]]) -> str:
    """A circle of imports, or ""."""
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> str:
        if module in trail:
            return " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return ""
        done.add(module)
        return next(filter(None, (visit(target, (*trail, module)) for target in edges.get(module, ()))), "")

    return next(filter(None, (visit(module, ()) for module in edges)), "")


def test_no_import_circle() -> None:
    edges = {module: imports(module) for module in MODULES}
    assert edges["benchmarks.training.runner"] and edges["tests.test_docs"] and edges["book.hooks"]
    assert circle(edges) == ""


def test_a_circle_is_found() -> None:
    assert circle({"a": ("b",), "b": ("c", "d"), "d": ("b",)}) == "b -> d -> b"
    assert circle({"a": ("b", "c"), "b": ("c",)}) == ""


def test_the_library_imports_nothing_beside_it() -> None:
    beside = re.compile(r"^\s*(from|import) (benchmarks|book|tests|examples)\b", re.MULTILINE)
    assert not [path for path in (ROOT / "src").rglob("*.py") if beside.search(path.read_text(encoding="utf-8"))]


def test_the_pages_read_the_benchmarks_through_one_face() -> None:
    taken = {name for module in MODULES if module.startswith("book.") for name in imports(module)}
    assert {name for name in taken if name.startswith("benchmarks")} == {"benchmarks.read"}
    readers = [module for module in MODULES if "benchmarks.read" in imports(module)]
    assert not [module for module in readers if module.startswith("benchmarks")]


# -- results --------------------------------------------------------------------------------------------------------


def test_figures_and_rows_are_few_bytes() -> None:
    kept = [path for path in (ROOT / "benchmarks").rglob("*") if path.is_file() and is_result(path)]
    assert len(kept) > 40
    assert sum(path.stat().st_size for path in kept) <= MOST_BYTES
    assert max(path.stat().st_size for path in kept) <= MOST_BYTES / 10


def is_result(path: Path) -> bool:
    """Whether a file is neither a program, nor its settings, nor what programs leave in a checkout and git ignores."""
    ignored = {"__pycache__", "__cache__", "outputs"} & set(path.parts)
    return not ignored and path.suffix not in {".py", ".yml", ".pyc"}

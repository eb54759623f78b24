"""The shape of the code: imports in one direction, few dependencies, short files, no trace of a workplace."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "layerwise"

# Which packages each package imports from, exactly; `errors` and its own modules are free to all. The table of contents
# (`layerwise/__init__.py`) and what stands above it import anything below them.
ALLOWED = {
    "errors": "",
    "tensors": "",
    "ranks": "",
    "losses": "",
    "nn": "",
    "rows": "tensors",
    "ops": "rows tensors",
    "tape": "losses nn ops ranks tensors",
    "replay": "nn ops tape tensors",
    "graph": "losses ops rows tape tensors",
    "gradient": "ops rows tape tensors",
    "operators": "graph losses rows tape tensors",
    "quantities": "gradient graph losses operators ops ranks rows tape tensors",
    "observation": "gradient graph losses quantities ranks replay rows tape tensors",
    "local": "graph losses operators ops replay rows tape tensors",
    "optim": "optim.layer_local optim.second_order",
    "optim.base": "optim.deferred optim.group_settings optim.parameter_forms optim.recording optim.saved_state replay "
    "tape",
    "optim.deferred": "replay tensors",
    "optim.recording": "losses replay tensors",
    "optim.parameter_forms": "",
    "optim.group_settings": "",
    "optim.saved_state": "tensors",
    "optim.keywords": "",
    "optim.layer_local": "graph local optim.base optim.deferred optim.group_settings optim.keywords optim.recording "
    "optim.saved_state ranks replay tape tensors",
    "optim.second_order": "gradient graph losses observation operators optim.base optim.deferred optim.keywords "
    "optim.recording optim.saved_state quantities ranks replay rows tape tensors",
    "monitor": "gradient graph observation quantities replay tape tensors",
    "attribution": "gradient observation operators quantities ranks replay rows tape",
    "distributed": "local optim.deferred optim.keywords optim.layer_local ranks replay tape tensors",
    "": "attribution distributed local losses monitor nn observation operators optim optim.layer_local quantities",
    "compat": "gradient graph losses monitor observation operators quantities replay rows tape",
    "demo": "",
    "cli": "demo",
}
ABOVE = {"compat", "demo", "cli"}  # these may also import the table of contents
MOST_FLOORS = 13  # the longest chain of imports between packages
MOST_FILES, MOST_DEPTH = 12, 2  # modules of a package without its `__init__`, levels below the root
ROOT_MODULES = {"__init__", "errors", "tensors", "cli"}
CORE_IMPORTS = {"torch", "numpy", "layerwise"} | sys.stdlib_module_names
OUTSIDE_CORE = {"demo", "cli", "__main__"}
EXTRA_IMPORTS = {  # modules for users of another library, which nothing imports
    "layerwise.compat.laplace": {"laplace"},
    "layerwise.compat.lightning": {"lightning", "pytorch_lightning"},
    "layerwise.compat.transformers": {"transformers"},
}
MOST_CODE_LINES = 300  # neither blank, nor comment, nor docstring
MOST_LINES = 400

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted module name: `layerwise.ops.linear`."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top(module: str) -> str:
    """The part of the library that a module belongs to: `ops` for `layerwise.ops.linear`; three in `optim`."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[0] == "optim" else 1]) if parts else ""


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[str, ...]:
    """All modules that a file imports, wherever it does; relative ones resolved, submodules by their name."""
    module = name_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(parsed(path)):
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


def files(check: Callable[[Path], None]) -> Callable[[], None]:
    """One test of all files, which lists what each of them says: a test for each file and rule takes a minute."""

    def test() -> None:
        wrong = {}
        for path in FILES:
            try:
                check(path)
            except AssertionError as error:
                wrong[str(path.relative_to(SRC))] = str(error)
        assert not wrong, "\n".join(f"{path}: {text}" for path, text in wrong.items())

    return test


@cache
def packages() -> dict[str, set[str]]:
    """The packages that each package imports from, found in its files."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        mine = top(name_of(path))
        found.setdefault(mine, set()).update({top(module) for module in inner(path)} - {mine})
    return found


def test_packages_import_exactly_what_the_table_says() -> None:
    allowed = {
        name: set(others.split()) | ({""} if name in ABOVE - {"compat"} else set()) for name, others in ALLOWED.items()
    }
    for name, others in packages().items():
        line = (PACKAGE.joinpath(*name.split(".")) / "__init__.py") if name else PACKAGE / "__init__.py"
        says = ast.get_docstring(parsed(line)) if line.exists() else ""
        assert others - {"errors"} == allowed.get(name), (
            f"`{name}` ({says}) imports from {sorted(others)}: change ALLOWED, or the code"
        )
    assert packages().keys() == ALLOWED.keys()


def test_packages_stand_on_few_floors() -> None:
    @cache
    def floor(name: str) -> int:  # a circle never ends: RecursionError
        return 1 + max(map(floor, packages()[name]), default=0)

    floors = {name: floor(name) for name in packages()}
    assert max(floors.values()) <= MOST_FLOORS, floors


def test_root_is_closed() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda path: path.name)
def test_packages_are_small_and_say_what_they_hold(folder: Path) -> None:
    below = folder.relative_to(PACKAGE).parts
    assert len(list(folder.glob("*.py"))) - 1 <= MOST_FILES, f"{folder.name}: two packages?"
    assert len(below) <= MOST_DEPTH + ("compat" in below)
    says = ast.get_docstring(parsed(folder / "__init__.py"))
    assert says and says.splitlines()[0].endswith("."), (
        f"{folder.name}/__init__.py says in one sentence what lives there"
    )


def test_rows_know_no_slot() -> None:
    named = [path.name for path in FILES if top(name_of(path)) == "rows" and re.search(r"\bSlot\b", path.read_text())]
    assert not named


def twice(names: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that stand in several places, with these."""
    found: dict[str, list[str]] = {}
    for name, place in names:
        found.setdefault(name, []).append(place)
    return {name: places for name, places in found.items() if len(places) > 1}


def test_no_file_name_twice() -> None:
    names = [(path.stem, name_of(path)) for path in FILES if path.stem not in {"__init__", "base"}]
    assert not twice(names)


# `lw.KFAC` is the quantity, `lw.optim.KFAC` the optimizer that is made with it.
SAME_CLASS_NAME = {
    "KFAC", "Layer", "Step",
}  # fmt: skip


def test_no_class_name_twice() -> None:
    names = [
        (node.name, name_of(path))
        for path in FILES
        if "compat" not in path.parts
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert twice(names).keys() == SAME_CLASS_NAME  # only to shrink


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def private_names(path: Path) -> frozenset[str]:
    """What a file defines with one leading underscore: functions, methods, fields, attributes."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(filter(private, found))


def reaches(path: Path) -> set[str]:
    """The private names of other modules of the library that a file reads or imports."""
    ours = frozenset[str]().union(*map(private_names, FILES)) - {
        "_replace",
        "_base",
        "_modules",
        "_parameters",
        "_buffers",
        "_values",
    }  # Python's, torch's
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layerwise"):
            found.update(alias.name for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Attribute) and node.attr in ours - private_names(path):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in {"self", "cls"}):
                found.add(node.attr)
    return found


@files
def test_no_private_name_across_modules(path: Path) -> None:
    assert not reaches(path)


@files
def test_imports_across_packages_are_of_public_names(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.ImportFrom) or node.level or top(node.module or "") == top(name_of(path)):
            continue
        if (node.module or "") in MODULES - {"layerwise"}:
            public = set(getattr(importlib.import_module(node.module), "__all__", ()))
            hidden = [a.name for a in node.names if a.name not in public and f"{node.module}.{a.name}" not in MODULES]
            assert not hidden, f"{name_of(path)} imports {hidden} of {node.module}, which are not in its __all__"


MOST_PARAMETERS = 8
MANY_PARAMETERS = {  # only to shrink; functions of torch keep torch's own signatures
    "observation.accumulate.accumulate": 10,
    "ops.attention.multi_head_attention": 25,
    "ops.recurrent._lstm": 9,
    "ops.recurrent._plain": 10,
}


def parameters(path: Path) -> Iterator[tuple[str, int]]:
    """The functions of a file with the number of their parameters, without self."""
    tree = parsed(path)
    owners = {id(f): c.name for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            owner = owners.get(id(node))
            yield f"{owner}.{node.name}" if owner else node.name, len(names) - (names[:1] in (["self"], ["cls"]))


def module_of(function: str) -> str:
    """The module that a dotted function of MANY_PARAMETERS stands in."""
    parts = function.split(".")
    return next(".".join(parts[:k]) for k in range(len(parts), 0, -1) if f"layerwise.{'.'.join(parts[:k])}" in MODULES)


@files
def test_functions_take_few_parameters(path: Path) -> None:
    place = name_of(path).removeprefix("layerwise.")
    many = {f"{place}.{name}": count for name, count in parameters(path) if count > MOST_PARAMETERS}
    expected = {name: count for name, count in MANY_PARAMETERS.items() if module_of(name) == place}
    assert many == expected


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


def test_every_public_name_is_there_and_the_optimizers_wait_for_their_first_use() -> None:
    program = (
        "import sys, layerwise\n"
        "early = [p for p in ('attribution', 'distributed', 'local', 'monitor', 'optim') "
        "if f'layerwise.{p}' in sys.modules]\n"
        "missing = [n for n in layerwise.__all__ if n not in dir(layerwise) or not hasattr(layerwise, n)]\n"
        "print(early, missing, layerwise.AltMin is layerwise.optim.AltMin)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[0] == "[] [] True"


def code_lines(path: Path) -> int:
    """The lines that hold code: neither blank, nor comment, nor docstring."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    skip |= {tokenize.ENCODING, tokenize.ENDMARKER}
    lines: set[int] = set()
    with path.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type not in skip:
                lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(parsed(path)):
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

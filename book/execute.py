"""Run the Python of a page and show what it gives: printed text, and the value of every bare expression."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.ops import registry

__all__ = ["Failed", "run_block", "shown", "with_outputs"]

BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n", flags=re.DOTALL | re.MULTILINE)
OPTIONAL = ("laplace", "opacus", "scipy")  # libraries that a page may import besides torch and this one
MOST = 8  # numbers, entries and lines shown in full


class Failed(Exception):
    """A block of a page raised; the message names both."""


def with_outputs(markdown: str, page: str) -> str:
    """The page with the output of each of its Python blocks behind it, run in turn in one namespace, from seed 0."""
    space: dict[str, Any] = {"__name__": page}
    known = set(registry.BUILD)
    numbers = iter(range(1, 1000))
    torch.manual_seed(0)

    def shown_with(match: re.Match[str]) -> str:
        try:
            output = run_block(match["code"], space, page)
        except Exception as error:
            raise Failed(f"{page}, block {next(numbers)}: {type(error).__name__}: {error}") from error
        next(numbers)
        return match[0] + (f'\n```{{ .text .output title="Output" }}\n{output}\n```\n' if output else "")

    try:
        return BLOCK.sub(shown_with, markdown)
    finally:
        for func in registry.BUILD.keys() - known:  # a page registers operations for itself alone
            del registry.BUILD[func]


def run_block(code: str, space: dict[str, Any], name: str) -> str:
    """Run a block; the text of what it printed and of its bare expressions, in their order."""
    lacking = [lib for lib in _imported(code) if lib in OPTIONAL and importlib.util.find_spec(lib) is None]
    if lacking:
        return f"(not run in this build: {', '.join(lacking)} is not installed)"
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        for statement in ast.parse(code).body:
            if not isinstance(statement, ast.Expr):
                exec(compile(ast.Module([statement], []), name, "exec"), space)
                continue
            value = eval(compile(ast.Expression(statement.value), name, "eval"), space)
            for line in _lines(statement.value, value):
                print(line)  # noqa: T201  what is printed here is the page's output
    return said.getvalue().rstrip()


def _imported(code: str) -> list[str]:
    return re.findall(r"^(?:from|import) (\w+)", code, flags=re.MULTILINE)


def _lines(source: ast.expr, value: Any) -> Iterator[str]:
    """`expression: value`, for a tuple one line each."""
    if isinstance(source, ast.Tuple):
        for part, item in zip(source.elts, value, strict=True):
            yield from _lines(part, item)
    elif not (value is None or isinstance(value, torch.Generator | nn.Module)):
        label, text = ast.unparse(source), shown(value)
        if isinstance(source, ast.Dict | ast.DictComp):
            yield text
            return
        yield f"{label}:\n{_indented(text)}" if "\n" in text else f"{label}: {text}"


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def shown(value: Any) -> str:
    """A value as a reader wants it: few digits, large tensors by shape and range, mappings a line an entry."""
    if isinstance(value, np.ndarray | np.generic):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        return _tensor(value.detach())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping) and value:
        entries = [f"{key}: {shown(item)}" for key, item in value.items()]
        return "\n".join(entries[:MOST] + ["..."] * (len(entries) > MOST))
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown_items = ", ".join(shown(item) for item in value[:MOST])
        return f"[{shown_items}{', ...' if len(value) > MOST else ''}]"
    return str(value)


def _tensor(value: Tensor) -> str:
    if value.numel() == 1:
        return shown(value.item())
    if value.ndim == 1 and value.numel() <= MOST:
        return shown(value.tolist())
    shape = f"tensor {list(value.shape)}"
    if not value.is_floating_point() or not value.numel():
        return shape
    return f"{shape}, {float(value.min()):.3g} to {float(value.max()):.3g}"

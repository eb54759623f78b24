"""The pages of docs/: their code runs, their lists are complete, their links lead somewhere; the built site is walked.

The walk needs MkDocs (`requirements/docs.txt`) and Chromium, and is slow; all else needs neither.
"""

from __future__ import annotations

import ast
import functools
import http.server
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import threading
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, executable

import layerwise as lw
from benchmarks import probe, read
from book import api, drawings, execute, inserts, pictures, tables
from book.markup import as_markdown, with_whole_heads
from layerwise import errors
from layerwise.ops.registry import BUILD

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
RUN = [page for page in PAGES if page.startswith(("methods/", "extending/", "reference/"))]  # others have their tests


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def spans(markdown: str) -> list[str]:
    """The inline code of a page, and its blocks that are shown without being run (```py)."""
    shown = re.findall(r"^```py\n(.*?)^```$", markdown, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return shown + re.findall(r"`([^`\n]+)`", prose)


def prose_and_formulas(markdown: str) -> tuple[str, list[str]]:
    """A page without its code, comments and formulas; and the formulas."""
    plain = re.sub(r"^```.*?^```$|<!--.*?-->", "", markdown, flags=re.DOTALL | re.MULTILINE)
    plain = re.sub(r"`[^`\n]+`", "", plain)
    formulas = r"\$\$\n(.*?)\n\$\$|\$(\S|\S[^$]*?\S)\$"
    found = [block or line for block, line in re.findall(formulas, plain, flags=re.DOTALL)]
    return re.sub(formulas, "", plain, flags=re.DOTALL), found


# -- code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in RUN if "```python" in text(page)])
def test_page_runs_and_shows_its_output(page: str) -> None:
    shown = execute.with_outputs(text(page), page)
    assert 'title="Output"' in shown and "False" not in re.findall(r"^torch\.allclose.*: (\w+)$", shown, re.MULTILINE)


def test_what_a_page_registers_is_known_to_it_alone() -> None:
    shown = execute.with_outputs(text("extending/layer.md"), "layer.md")
    assert re.search(r"before\.kfac\.forms:\s+weight: gradients", shown)
    assert re.search(r"after\.kfac\.forms:\s+weight: rows", shown)
    assert torch.inner not in BUILD


def test_a_block_that_fails_fails_the_page() -> None:
    page = "# A page\n\n```python\nx = 1\n```\n\n```python\nx + y\n```\n"
    with pytest.raises(execute.Failed, match=r"here\.md, block 2: NameError: name 'y'"):
        execute.with_outputs(page, "here.md")


def test_values_are_shown() -> None:
    space: dict[str, Any] = {"t": torch.arange(12.0).view(3, 4), "one": torch.tensor(0.123456)}
    code = "print('said')\nt, one\nt.shape\nnothing = None\nnothing\n[1.0, 2.5]\n{'a': 1, 'b': one}\n"
    assert execute.run_block(code, space, "page").splitlines() == [
        "said", "t: tensor [3, 4], 0 to 11", "one: 0.1235", "t.shape: [3, 4]", "[1.0, 2.5]: [1, 2.5]",
        "a: 1", "b: 0.1235",
    ]  # fmt: skip


def test_a_block_of_a_missing_library_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "opacus is not installed" in execute.run_block("from opacus.accountants import X\n", {}, "page")


# -- lists ----------------------------------------------------------------------------------------------------------


def test_every_error_has_its_section_and_says_what_to_do() -> None:
    sections = re.split(r"^## `(\w+)`$", text("reference/errors.md"), flags=re.MULTILINE)[1:]
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    assert set(found) == set(errors.__all__) - {"LayerwiseError", "LayerwiseWarning"}
    assert all("**What to do.**" in section for section in found.values())


def test_the_errors_of_the_page_are_raised() -> None:
    shown = execute.with_outputs(text("reference/errors.md"), "errors.md")
    for section in re.split(r"^## ", shown, flags=re.MULTILINE)[1:]:
        name = re.match(r"`(\w+)`", section)
        outputs = re.findall(r'title="Output" }\n(.*?)```', section, flags=re.DOTALL)
        assert name is not None and all(out.startswith(f"{name[1]}: ") for out in outputs)
        assert bool(outputs) == ("```python" in section)


def test_every_quantity_and_optimizer_has_its_method() -> None:
    methods = "".join(text(page) for page in PAGES if page.startswith("methods/"))
    for name in lw.__all__:
        value = getattr(lw, name)
        if isinstance(value, type) and issubclass(value, lw.Quantity) and value is not lw.Quantity:
            assert f"`{name}`" in methods, name
    for name in (*lw.optim.__all__, *lw.nn.__all__):
        assert re.search(rf"\b{name}\b", methods), name


def unproved(markdown: str, tests: dict[str, set[str]]) -> list[str]:
    """Tests that a page names and that are not there, or not in the file named in the same line; and lines without any
    in tables with a column "test"."""
    wrong, claims = [], False
    for line in markdown.splitlines():
        last = line.rstrip("| ").rpartition("|")[2].strip()
        claims = line.startswith("|") and (claims or last == "test")
        named, files = re.findall(r"`(test_\w+)`", line), re.findall(r"`tests/(test_\w+)\.py`", line) or list(tests)
        wrong += [name for name in named if not any(name in tests.get(file, ()) for file in files)]
        if claims and not named and last not in {"test", "---", "the same"}:
            wrong.append(line)
    return wrong


def test_claims_name_tests_that_exist() -> None:
    tests = {
        path.stem: set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
        for path in (ROOT / "tests").glob("test_*.py")
    }
    assert sum(len(re.findall(r"`test_\w+`", text(page))) for page in PAGES) > 40
    assert {page: wrong for page in PAGES if (wrong := unproved(text(page), tests))} == {}
    head, known = "| new | test |\n|---|---|\n", {"test_a": {"test_x"}, "test_b": {"test_y"}}
    assert not unproved(f"{head}| a | `test_x` |\n| b | the same |\n| c | `test_y` (`tests/test_b.py`) |\n", known)
    assert unproved(f"{head}| a | `test_z` |\n| b | `test_x` (`tests/test_b.py`) |\n", known) == ["test_z", "test_x"]
    assert unproved(f"{head}| a | soon |\n\n| b | c |\n|---|---|\n| d | e |\n", known) == ["| a | soon |"]


SEEN = typing.get_type_hints(lw.observe.__enter__)["return"]
GRADIENT = typing.get_type_hints(lw.Quantity.compute)["gradient"]


def quantity_names(page: str) -> set[str]:
    """What `seen.` may be followed by: the library's quantities, those that the page defines, and `Seen`'s own."""
    classes = [name for name in lw.__all__ if isinstance(getattr(lw, name), type)]
    classes = [name for name in classes if issubclass(getattr(lw, name), lw.Quantity)]
    defined = re.findall(r"^class (\w+)\(lw\.Quantity\)", page, flags=re.MULTILINE)
    made = [object.__new__(getattr(lw, name)).name for name in classes]
    return {*made, *(type(name, (lw.Quantity,), {})().name for name in defined), *dir(SEEN)}


@functools.cache
def named_tests() -> frozenset[str]:
    """The names of all tests."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    return frozenset(name for text in texts for name in re.findall(r"^def (test_\w+)", text, flags=re.MULTILINE))


def without_meaning(markdown: str) -> list[str]:
    """The names in a page's inline code, of the library, `gradient`, `seen` or tests, that do not exist."""
    found = []
    for span in spans(markdown):
        for dotted in re.findall(r"(?<![\w.])lw((?:\.\w+)+)", span):
            value: Any = lw
            for name in dotted[1:].split("."):
                if not hasattr(value, name):
                    found.append(f"lw{dotted}")
                    break
                value = getattr(value, name)
        found += [f"gradient.{n}" for n in re.findall(r"\bgradient\.(\w+)\(", span) if not hasattr(GRADIENT, n)]
        names = re.findall(r"\bseen\.(\w+)", span)
        found += [f"seen.{n}" for n in names if n not in quantity_names(markdown)] if names else []
        found += [f"{span}: {keyword}=" for keyword in unknown_keywords(span)]
        found += [span] if re.fullmatch(r"test_\w+", span) and span not in named_tests() else []
    return found


def unknown_keywords(span: str) -> list[str]:
    """The keywords of calls `lw.X(keyword=...)` that X does not take."""
    try:
        tree = ast.parse(span)
    except SyntaxError:
        return []
    found = []
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and (path := ast.unparse(call.func)).startswith("lw."):
            value: Any = functools.reduce(lambda at, name: getattr(at, name, None), path.split(".")[1:], lw)
            if isinstance(value, type) or inspect.isfunction(value):
                known = inspect.signature(value).parameters
                open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
                found += [str(k.arg) for k in call.keywords if k.arg and k.arg not in known and not open_ended]
    return found


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_names_in_the_text_exist(page: str) -> None:
    assert without_meaning(text(page)) == []


def test_a_name_that_does_not_exist_is_found() -> None:
    page = "`gradient.dots()`, `lw.optim.Kfac(model)`, `seen.varianze`, `lw.Sketch(dims=3)`, `seen.kfac`\n"
    wrong = ["gradient.dots", "lw.optim.Kfac", "seen.varianze", "lw.Sketch(dims=3): dims="]
    assert without_meaning(page) == wrong
    assert without_meaning("`test_a_name_that_does_not_exist`, `test_oja`") == ["test_a_name_that_does_not_exist"]
    assert without_meaning("```py\nlw.distributed.save_all()\n```\n") == ["lw.distributed.save_all"]
    assert without_meaning("class OwnThing(lw.Quantity):\n\n`seen.own_thing`, `seen.grad`\n") == []


@pytest.mark.parametrize("page", PAGES)
def test_formulas_read_well_as_plain_markdown(page: str) -> None:
    """Dollars mark formulas; no formula has what GitHub's Markdown changes before it typesets."""
    prose, found = prose_and_formulas(text(page))
    assert "$" not in prose
    for formula in found:
        assert not re.search(r"\\[^A-Za-z]|\||\\operatorname", formula), formula


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_not_set_as_code(page: str) -> None:
    maths = "Σ√ᵀ‖⟨⊗∂∇⁻∘"
    assert [span for span in spans(text(page)) if set(span) & set(maths)] == []


@pytest.mark.parametrize("module", [module for _, modules in api.PAGES.values() for module in modules])
def test_every_public_name_has_a_docstring(module: str) -> None:
    if module in api.STATIC:
        path = ROOT / "src" / (module.replace(".", "/") + ".py")
        source = path.read_text(encoding="utf-8")
        assert all(re.search(rf'class {name}\(.*\):\n    """', source) for name in api.STATIC[module])
        return
    loaded = importlib.import_module(module)
    missing = [name for name in api.names(module) if not inspect.getdoc(getattr(loaded, name))]
    assert not missing and inspect.getdoc(loaded)


def test_the_api_has_every_public_name_once() -> None:
    written = "\n".join(page for _, page in api.pages())
    blocks = re.findall(r"^::: (\S+)$", written, flags=re.MULTILINE)
    assert len(blocks) == len(set(blocks))
    for _, modules in api.PAGES.values():
        for module in modules:
            assert set(api.names(module).values()) <= set(blocks)
            assert all(f"`{name}`" in written for name in api.values(module))


def test_docstrings_become_markdown() -> None:
    source = "Sum a_n * b_n.\n\n    x = a_n * b_n\n\nfirst: <R_j>, `a_n * b`; second: as it. third: no.\nRaises X.\n"
    assert as_markdown(source, ("first", "second")).splitlines() == [
        r"Sum a\_n \* b\_n.", "", "    x = a_n * b_n", "",
        r"**first**: \<R\_j\>, `a_n * b`; **second**: as it. third: no.", "", "Raises X.",
    ]  # fmt: skip


def test_a_list_of_arguments_becomes_paragraphs() -> None:
    source = "Sum.\n\nArgs:\n    first: one,\n        and_more.\n    second, third: two.\n\n    x = a_n\n\nRaises X.\n"
    assert as_markdown(source, ("first", "second", "third")).splitlines() == [
        "Sum.", "", "**first**: one,", r"and\_more.", "", "**second, third**: two.", "", "    x = a_n", "", "Raises X.",
    ]  # fmt: skip


# -- links, pictures, inserts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    generated = {path for path, _ in api.pages()} | {f"results/study-{name}.md" for name in tables.STUDIES}
    for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)):
        target = (DOCS / page).parent / link
        inside = os.path.relpath(target, DOCS).replace(os.sep, "/")
        assert "://" not in link and (target.exists() or inside in generated), link


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawings_are_those_of_the_program(name: str, tmp_path: Path) -> None:
    drawings.write(tmp_path)
    drawn = (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8")
    assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8") == drawn  # else: python -m book.drawings
    assert any(f"images/{name}.svg" in text(page) for page in PAGES)


def test_drawings_go_into_the_page() -> None:
    shown = pictures.with_drawings('![A "tape"](images/tape.svg)\n\n![x](images/curves.png)\n', "idea.md", DOCS)
    assert '<figure class="drawing" role="img" aria-label="A &quot;tape&quot;"><svg' in shown
    assert "<style>" not in shown and "![x](images/curves.png)" in shown


def test_a_program_is_inserted_in_full_and_not_run() -> None:
    shown = inserts.filled("<!-- book: listing examples/noise_scale.py -->", "x.md")
    source = (ROOT / "examples" / "noise_scale.py").read_text(encoding="utf-8")
    assert source.rstrip() in shown and execute.with_outputs(shown + "\n", "x.md") == shown + "\n"
    with pytest.raises(inserts.Unknown, match="no Python file"):
        inserts.filled("<!-- book: listing examples/nothing.py -->", "x.md")


def test_formulas_become_mathml() -> None:
    formulas = pytest.importorskip("book.formulas", reason="latex2mathml is not installed: `make docs` installs it")
    page = '<p><span class="arithmatex">\\(\\lVert a &lt; b \\rVert\\)</span></p>'
    made = formulas.typeset(page + '<div class="arithmatex">\n\\[\nx\n\\]\n</div>')
    assert "arithmatex" not in made and made.count("<math ") == 2 and made.count('display="block"') == 1
    assert made.count('stretchy="false" lspace="0" rspace="0">&#x02016;') == 2 and "&#x0003C;" in made
    kept = formulas.typeset("(" + page[3:-4] + "), where")
    assert kept.startswith('<span class="whole">(<math') and kept.endswith("</math>),</span> where")
    assert "<mi>tr</mi><mspace" in formulas.mathml(r"\mathrm{tr} A")
    assert 'form="prefix"' in formulas.mathml("(-x)") and 'form="prefix"' not in formulas.mathml("(a - x)")
    with pytest.raises(formulas.Unclear, match=r"\\unheard"):
        formulas.mathml(r"\unheard x")


def test_the_font_has_the_characters_and_the_table_of_mathematics(tmp_path: Path) -> None:
    formulas = pytest.importorskip("book.formulas", reason="latex2mathml is not installed: `make docs` installs it")
    pytest.importorskip("ziamath", reason="ziamath is not installed: `make docs` installs it")
    from fontTools.ttLib import TTFont

    formulas.write_font(tmp_path / "math.woff")
    font = TTFont(tmp_path / "math.woff")
    assert "MATH" in font and {ord(c) for c in "x=∂∇Σ‖⊗⟨"} <= set(font.getBestCmap())
    assert {0x1D465, 0x1D6FE} <= set(font.getBestCmap())  # an italic x and γ, as identifiers are drawn
    assert (tmp_path / "math.woff").stat().st_size < 250_000


def test_heads_of_tables_keep_names_with_hyphens_whole() -> None:
    page = '<tr><th align="left">mnist-2x100, test</th><th data-x="a-b">no</th></tr><td>a-b</td>'
    whole = page.replace("mnist-2x100", '<span class="whole">mnist-2x100</span>')
    assert with_whole_heads(page) == whole


def test_pictures_from_elsewhere_are_copied() -> None:
    page = "![losses](../../benchmarks/results/matching_losses.png)\n"
    assert pictures.outside(page, "methods/x.md") == ["../benchmarks/results/matching_losses.png"]
    assert "](../results/files/matching_losses.png)" in pictures.with_outside(page, "methods/x.md")


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- book:" in text(page)])
def test_inserts_are_known_and_filled(page: str) -> None:
    assert "<!-- book:" not in inserts.filled(text(page), page)


def test_an_unknown_insert_is_refused() -> None:
    with pytest.raises(inserts.Unknown, match="asks for 'price'"):
        inserts.filled("<!-- book: price of it -->", "x.md")


def test_tables_have_the_files_numbers() -> None:
    cell = read.overhead()["3c3d/variance"]["contenders"]
    assert f"3C3D {cell['ours']['ratio']:.2f} (" in tables.cost("variance")
    row = next(line for line in tables.overhead("3c3d").splitlines() if line.startswith("| variance"))
    assert f"| {cell['ours']['ratio']:.2f} | {cell['backpack']['ratio']:.2f} |" in row
    both = read.result("overhead_rows")["cells"]["all-cnn-c/norms"]["contenders"]
    wanted = " | ".join(f"{both[who]['ratio']:.2f}" for who in ("ours", "rows", "vmap"))
    assert f"| All-CNN-C | norms | {wanted} |" in tables.overhead_rows("")
    with pytest.raises(KeyError, match="price"):
        tables.cost("price")
    found = next(s for s in read.result("reproduce_locoprop")["summary"] if s["epoch"] == 3)
    assert f"| 3 | {found['authors_train_loss']:.2f} | {found['median_train_loss']:.2f} |" in tables.reproduction("")


def test_what_has_not_been_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "runs", lambda study: {"mnist-2x100": 0})
    assert "not run yet" in tables.study("altmin")
    monkeypatch.setattr(probe, "RESULTS", Path("nowhere"))
    assert tables.altmin("depth") == "*Not run yet: `python -m benchmarks.papers.altmin depth`.*"


# -- the site -------------------------------------------------------------------------------------------------------

SEARCHED = "per-sample gradient"
LOOKS = [(1280, False), (1280, True), (390, False), (390, True)]
LOADED = "[...document.images].every(image => image.complete)"
BROKEN = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
WIDE = "document.documentElement.scrollWidth > innerWidth + 1"
DIM = """[...document.querySelectorAll('.drawing text, .md-typeset p, .md-typeset td')].filter(e => {
    const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
    const light = c => { const [r, g, b] = rgb(c); return (0.299 * r + 0.587 * g + 0.114 * b) / 255; };
    const style = getComputedStyle(e), paper = light(getComputedStyle(document.body).backgroundColor);
    return Math.abs(light(e.matches('text') ? style.fill : style.color) - paper) < 0.25;
}).length"""
SCROLLING = """[...document.querySelectorAll('.md-typeset pre > code')].filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.textContent.split('\\n').reduce((a, b) => b.length > a.length ? b : a))"""
BROKEN_HEADS = """[...document.querySelectorAll('.md-typeset th')].flatMap(head => {
    const walk = document.createTreeWalker(head, NodeFilter.SHOW_TEXT), broken = [];
    for (let node = walk.nextNode(); node; node = walk.nextNode())
        for (const word of node.parentElement.closest('math') ? [] : node.data.matchAll(/\\S+/g)) {
            const range = document.createRange();
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) broken.push(word[0]);
        }
    return broken;
})"""
NOT_TYPESET = """[...document.querySelectorAll('.md-typeset')].flatMap(part => {
    const copy = part.cloneNode(true);
    copy.querySelectorAll('pre, code').forEach(e => e.remove());
    return copy.textContent.match(/[$]\\S{0,20}|\\\\\\w+/g) || [];
})"""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder is served for a while."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of the built site, served, and its pages."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: `make docs` installs it")
    if executable() is None:
        pytest.skip("no Chromium: install Debian's package `chromium`")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr

    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    with served(folder) as address:
        yield address, pages


def complaints(browser: Browser, address: str, page: str) -> list[str]:
    """What is wrong with a page: errors, requests to another host, pictures that are missing, width, faint text,
    formulas that are not typeset, heads of tables that break within a word, and on a desktop, code that scrolls.
    """
    browser.errors.clear()
    browser.requests.clear()
    browser.open(address + page)
    browser.run("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    browser.wait(LOADED)
    found = [f"error: {error}" for error in browser.errors]
    own = (address, "data:", "blob:", "about:")
    found += [f"another host: {url}" for url in browser.requests if not url.startswith(own)]
    found += [f"missing picture: {url}" for url in browser.run(BROKEN)]
    if browser.run(WIDE):
        found.append("wider than the screen")
    if faint := browser.run(DIM):
        found.append(f"{faint} texts that are hard to see")
    found += [f"a formula that is not typeset: {formula}" for formula in browser.run(NOT_TYPESET)]
    found += [f"a head that breaks: {word}" for word in browser.run(BROKEN_HEADS)]
    if browser.run("innerWidth > 1200"):
        found += [f"code that scrolls: {line}" for line in browser.run(SCROLLING)]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("width", "dark"), LOOKS, ids=["desktop", "desktop-dark", "phone", "phone-dark"])
def test_walk(site: tuple[str, list[str]], width: int, dark: bool) -> None:
    """Nothing is wrong with any page, and it has the colours that were asked for."""
    address, pages = site
    assert len(pages) >= 40
    with Browser(width, 900, dark, mobile=width < 600) as browser:
        for page in pages:
            assert complaints(browser, address, page) == [], page
            scheme = browser.run("document.body.getAttribute('data-md-color-scheme')")
            assert scheme == ("slate" if dark else "default"), page


BAD = """<html><head><link rel="icon" href="data:,"></head><body style="background: #fff">
<script>console.error("oh")</script><img src="missing.png"><img src="http://127.0.0.2:9/elsewhere.png">
<div class="md-typeset"><p style="color: #eee">faint</p><p style="width: 5000px; background: #ddd">wide</p>
<p>$x_n$ and \\frac12, but not <code>$HOME</code></p>
<table><tr><th style="width: 3em; max-width: 3em; overflow-wrap: break-word">preconditioner of it</th></tr></table>
<pre style="width: 600px"><code style="display: block; overflow: auto">x = 1\n{line}</code></pre></div>
</body></html>""".replace("{line}", "y" * 200)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_walk_notices(tmp_path: Path) -> None:
    if executable() is None:
        pytest.skip("no Chromium: install Debian's package `chromium`")
    (tmp_path / "bad.html").write_text(BAD, encoding="utf-8")
    (tmp_path / "good.html").write_text("<html><head><link rel=icon href='data:,'></head><body>well</body></html>")
    with served(tmp_path) as address, Browser(1280) as browser:
        found = "\n".join(complaints(browser, address, "bad.html"))
        for kind in ("error: oh", "error: 404", "another host: http://127.0.0.2:9/", "missing picture", "wider than"):
            assert kind in found
        assert "1 texts that are hard to see" in found
        assert found.count("not typeset: ") == 2 and "not typeset: $x_n$" in found
        assert found.count("a head that breaks: ") == 1 and "a head that breaks: preconditioner" in found
        assert f"code that scrolls: {'y' * 200}" in found
        assert complaints(browser, address, "good.html") == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_search_finds(site: tuple[str, list[str]]) -> None:
    address, _ = site
    with Browser(1280) as browser:
        browser.open(f"{address}index.html?q={SEARCHED.replace(' ', '+')}")
        browser.wait("document.querySelectorAll('.md-search-result__item').length")
        links = browser.run("[...document.querySelectorAll('.md-search-result__link')].map(a => a.href)")
        first = next(n for n, link in enumerate(links) if "methods/first-order" in link)
        assert first < next(n for n, link in enumerate(links) if "/api/" in link)
        assert browser.errors == []

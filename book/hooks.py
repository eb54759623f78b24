"""The events of MkDocs at which the site takes shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from book import api, execute, formulas, inserts, pictures, studies, tables
from book.markup import with_whole_heads

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the API and of the studies, copies of pictures from elsewhere, and the font of formulas."""
    docs = Path(config.docs_dir)
    for path, text in [*api.pages(), *studies.pages()]:
        files.append(File.generated(config, path, content=text))
    for path, picture in [*studies.figures(), *tables.charts(studies.folder())]:
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    wanted: set[Path] = set()
    for page in files.documentation_pages():
        text = inserts.filled(page.content_string, page.src_uri)
        wanted |= {(docs / link).resolve() for link in pictures.outside(text, page.src_uri)}
    for picture in sorted(wanted):
        if not picture.is_relative_to(ROOT):
            raise PluginError(f"a page takes a picture from outside of the repository: {picture.name}")
        files.append(File.generated(config, f"{pictures.COPIES}/{picture.name}", abs_src_path=str(picture)))
    font = studies.folder() / "formulas.woff"
    formulas.write_font(font)
    files.append(File.generated(config, "stylesheets/formulas.woff", abs_src_path=str(font)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in what is generated, run what is Python, draw what is drawn."""
    torch.set_num_threads(1)
    name = page.file.src_uri
    try:
        markdown = inserts.filled(markdown, name)
        if not name.startswith("api/"):
            markdown = execute.with_outputs(markdown, name)
    except (execute.Failed, inserts.Unknown) as error:
        raise PluginError(str(error)) from error
    markdown = pictures.with_pipes(pictures.with_outside(markdown, name))
    return pictures.with_drawings(markdown, name, Path(config.docs_dir))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Typeset the formulas, and keep the heads of tables whole."""
    try:
        return with_whole_heads(formulas.typeset(html))
    except formulas.Unclear as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error

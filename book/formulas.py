"""Formulas of pages, `$...$` and `$$...$$`, as MathML, which browsers draw themselves; and the font that they need."""

from __future__ import annotations

import html
import re
from importlib import resources
from pathlib import Path

from fontTools import subset, ttLib
from latex2mathml.converter import convert

__all__ = ["Unclear", "mathml", "typeset", "write_font"]

MARKED = re.compile(
    r'(?P<before>[(\[]?)<(?P<tag>span|div) class="arithmatex">\s*\\(?P<kind>[(\[])(?P<tex>.*?)\\[)\]]\s*</(?P=tag)>'
    r"(?P<after>[.,;:)\]]*)",
    flags=re.DOTALL,
)
CHARACTERS = (
    (0x20, 0x7E), (0xA0, 0xFF), (0x2C6, 0x2DC), (0x300, 0x308), (0x391, 0x3F6), (0x2010, 0x2037), (0x2061, 0x2064),
    (0x2102, 0x213B), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2308, 0x230B), (0x27E8, 0x27E9), (0x1D400, 0x1D503),
    (0x1D6A8, 0x1D71B),
)  # fmt: skip
TIGHT = ("&#x02016;", "&#x0007C;", "&#x0002F;", "&#x02202;")  # norms and bars, a slash, a derivative's d
OPENING = r"(?:&#x00028;|\(|\[|&#x0005B;|&#x027E8;|&#x0003D;|&#x02190;|,|&#x0002C;)"
NAMED = r"(?<!<msub>)(?<!<msup>)(?<!<msubsup>)<mi>(?:arctan|cosh|cos|exp|log|max|min|tr|diag|vec|mean|median)</mi>"
SPACE = '<mspace width="0.17em"></mspace>'
ACCENTS = {"&#x0005E;": "&#x002C6;", "&#x000AF;": "&#x0203E;"}  # a hat that does not lie on the letter, a visible bar


class Unclear(Exception):
    """A formula that cannot be typeset."""


def mathml(tex: str, display: bool = False) -> str:
    r"""A formula in TeX as a MathML element. `\thinspace` is TeX's `\,`, which GitHub's Markdown would not keep."""
    found = convert(tex.strip().replace(r"\thinspace", r"\,"), display="block" if display else "inline")
    if "\\" in found:
        unknown = ", ".join(re.findall(r"\\\w*", found))
        raise Unclear(f"the formula {tex!r} has commands that are not known: {unknown}")
    # letters of a name are one identifier
    found = re.sub(
        r'(?:<mi mathvariant="normal">\w</mi>){2,}',
        lambda m: f"<mi>{re.sub('<[^>]*>', '', m[0])}</mi>",
        found,
    )
    found = re.sub(r"<mrow>(<mi>\w+</mi>)</mrow>", r"\1", found)
    for sign in TIGHT:
        found = re.sub(rf"<mo[^>]*>{sign}</mo>", f'<mo stretchy="false" lspace="0" rspace="0">{sign}</mo>', found)
        found = found.replace(f"<mi>{sign}</mi>", f'<mo lspace="0" rspace="0">{sign}</mo>')
    # a minus after an opening bracket, an equals sign or a comma is one of sign
    signed = r'\1<mo form="prefix" lspace="0" rspace="0">&#x02212;</mo>'
    found = re.sub(rf"(<mo[^>]*>{OPENING}</mo>)<mo>&#x02212;</mo>", signed, found)
    behind = rf"{NAMED}|<msub><mi>(?:log|mean)</mi><m[in]>\w+</m[in]></msub>"
    found = re.sub(rf"({behind})(?=<m(?:i|n|sub|sup|subsup|row|frac)>)", rf"\1{SPACE}", found)
    found = re.sub(rf"(?<=</mi>|</mn>)(?={NAMED})|(?<=&#x00029;</mo>)(?={NAMED})", SPACE, found)
    # a prime has its own height, and needs no raising
    prime = r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>'
    found = re.sub(r"<msup>(<mi>[^<]*</mi>)<m[io]>&#x02032;</m[io]></msup>", prime, found)
    for wrong, right in ACCENTS.items():
        found = found.replace(wrong, right)
    return found.replace("<mo>&#x0221E;</mo>", "<mi>&#x0221E;</mi>")


def typeset(page: str) -> str:
    """The HTML of a page with its formulas as MathML."""

    def formula(match: re.Match[str]) -> str:
        made = mathml(html.unescape(match["tex"]), display=match["kind"] == "[")
        if match["kind"] == "[":
            return f'<div class="formula">{made}</div>'
        before, after = match["before"], match["after"]  # signs that no line may begin or end with
        return f'<span class="whole">{before}{made}{after}</span>' if before or after else made

    return MARKED.sub(formula, page)


def write_font(path: Path) -> None:
    """STIX Two Math (as ziamath brings it), cut down to the characters of formulas, with its table for mathematics."""
    with resources.as_file(resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf") as source:
        font = ttLib.TTFont(source, recalcTimestamp=False)
        options = subset.Options(layout_features=["ssty"], name_IDs=["*"], hinting=False, notdef_outline=True)
        cut = subset.Subsetter(options)
        cut.populate(unicodes=[code for first, last in CHARACTERS for code in range(first, last + 1)])
        cut.subset(font)
        font.flavor = "woff"
        font.save(path)

"""Turns a figure into SVG that can be embedded in a page, in the page's font and colours.

Matplotlib writes a standalone file: with a prologue, namespace URLs, fixed colours, and element ids
that occur again in the next figure. All of that is removed or made unique here.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import TYPE_CHECKING, Any

from lora.report.canvas import BAND, DPI, INK, MUTED, PAPER, RULE, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", BAND: "--band", PAPER: "--paper"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}
"""The CSS variable of the page that replaces each colour of a figure."""


def svg_of(figure: Figure, name: str, alt: str) -> str:
    """Return `figure` as an <svg> element; the same figure gives the same text."""
    import matplotlib

    file = io.StringIO()
    # Keep text as text, and derive the ids of clip paths from their content, not at random.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        _ignore_glyphs()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inside(file.getvalue(), name, alt)


def png_of(figure: Figure) -> bytes:
    """Return `figure` as a PNG on white."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        _ignore_glyphs()
        figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _ignore_glyphs() -> None:
    # Names may have characters that matplotlib's font lacks and the browser has.
    warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)


def _inside(text: str, name: str, alt: str) -> str:
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    opening = re.match(r"<svg[^>]*>", body)
    box = re.search(r'viewBox="([^"]*)"', body)
    assert opening is not None
    assert box is not None
    body = body[opening.end() :].replace("xlink:href", "href")
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', body))
    kept = {one or other for one, other in used}
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in kept else "", body)
    for reference in sorted(kept, key=len, reverse=True):
        body = re.sub(
            rf'(id="|#){re.escape(reference)}(?=["\)])', rf"\g<1>{name}-{reference}", body
        )
    for colour, variable in VARIABLES.items():
        body = re.sub(rf"{colour}\b", f"var({variable})", body, flags=re.IGNORECASE)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"\s*\n\s*", "\n", body)
    label = html.escape("".join(c if c.isprintable() else "�" for c in alt), quote=True)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">{body.strip()}'

"""Pieces of HTML that the report's pages are made of. All text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

SHORT = 24
"""Characters of a cell that stays on one line: a number, a name."""

LONG = 40
"""A cell of more is not squeezed into a column of single words."""

STYLE = """
:root { color-scheme: light dark; --good: #2a8f4f; --plain: #7b7b7b; --bad: #c0392b; --rule: #8886; }
@media (prefers-color-scheme: dark) { :root { --good: #58c27d; --plain: #9a9a9a; --bad: #ff7b6b; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; overflow-wrap: anywhere; }
main { max-width: 80rem; margin: 0 auto; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; }
td, tbody th { border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
thead th { border-bottom: 1px solid currentColor; } tbody th { font-weight: normal; overflow-wrap: break-word; }
.wide { overflow-x: auto; } .wide table { overflow-wrap: normal; }
.short { white-space: nowrap; } .long { min-width: 14rem; max-width: 26rem; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; padding: .6rem .9rem; border-left: 4px solid; }
.good { border-color: var(--good); } .plain { border-color: var(--plain); } .bad { border-color: var(--bad); }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--rule); }
summary { cursor: pointer; margin: 2.2rem 0 .6rem; } summary h2 { display: inline; }
:focus-visible { outline: 2px solid currentColor; outline-offset: 1px; }
"""


def listing(title: str, items: Sequence[str]) -> str:
    """A heading with a list, or nothing."""
    if not items:
        return ""
    return f"<h2>{escape(title)}</h2><ul>" + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul>"


def facts(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A heading with names and values, which break where the page is narrow."""
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f"<h2>{escape(title)}</h2><table><tbody>{cells}</tbody></table>"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], folded: bool = False) -> str:
    """A heading with a table, or nothing where it has no rows. ``folded``: shown when the reader opens it."""
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    if not body:
        return ""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    return section(title, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", folded)


def section(title: str, content: str, folded: bool = False) -> str:
    """A heading with HTML that may be wider than the page: it scrolls by itself, from the keyboard too."""
    heading = f"<h2>{escape(title)}</h2>"
    wide = f'<div class="wide" tabindex="0" role="region" aria-label="{escape(title)}">{content}</div>'
    return f"<details><summary>{heading}</summary>{wide}</details>" if folded else heading + wide


def _cell(text: str) -> str:
    kind = ' class="short"' if len(text) <= SHORT else ' class="long"' if len(text) > LONG else ""
    return f"<td{kind}>{escape(text)}</td>"

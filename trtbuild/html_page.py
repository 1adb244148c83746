"""What the project's HTML pages share: one look in light and dark, at a desk and on a phone; sections and tables.

A page is one file that opens offline. Whatever comes from texts, names or paths is escaped by who puts it in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5c636b; --page: #ffffff; --card: #f4f5f7; --line: #d5d9de;
  --good: #0a7d43; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8ea; --soft: #a0a7af; --page: #15181b; --card: #1f2327;
  --line: #3a4047; --good: #4cc38a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 16px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 4px; } h2 { font-size: 1.15rem; margin: 32px 0 8px; }
p.soft, .soft { color: var(--soft); margin: 0 0 8px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 16px 0; }
.card { background: var(--card); border-radius: 8px; padding: 10px 12px; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } .wide th, .wide td { overflow-wrap: normal; white-space: nowrap; }
.number { text-align: right; } .facts td:first-child { color: var(--soft); min-width: 110px; overflow-wrap: normal; }
@media (max-width: 600px) {
  table { font-size: 13px; } th, td { padding-right: 8px; } th:last-child, td:last-child { padding-right: 0; }
  .wide th:not(.number), .wide td:not(.number) { white-space: normal; } .stacked thead { display: none; }
  .stacked tr { display: block; padding: 4px 0; border-bottom: 1px solid var(--line); }
  .stacked td { display: flex; justify-content: space-between; border: 0; padding: 2px 0; }
  .stacked td::before { content: attr(data-label); color: var(--soft); } }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 10px; }
pre { background: var(--card); border-radius: 8px; padding: 10px; margin: 4px 0; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 13px; }
.js-plotly-plot { min-height: 120px; }
.js-plotly-plot text:not(.heatmap-label *) { fill: var(--text) !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--line) !important; }
.js-plotly-plot .hoverlayer text { fill: #fff !important; }
"""


def document(title: str, content: str, *, head: str = "") -> str:
    """The whole page; `title` is HTML already, `head` more of the head: scripts, or styles of this page alone."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style>{head}</head><body>{content}</body></html>\n"
    )


def section(title: str, note: str, content: str) -> str:
    soft = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>{soft}{content}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, num_text: int, stacked: bool = False) -> str:
    """Cells are HTML already; those after the first `num_text` columns are numbers. On a phone a stacked table's rows
    become lists.
    """
    kinds = ["" if index < num_text else ' class="number"' for index in range(len(header))]
    head = "".join(f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, header, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{kind} data-label="{escape(name)}">{cell}</td>'
            for kind, name, cell in zip(kinds, header, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    name = ' class="stacked"' if stacked else ""
    return f'<div class="wide"><table{name}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

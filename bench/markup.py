"""Write Markdown tables and SVG charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from .figures import OURS, Row, Rows, is_baseline


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    ruler = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ruler, *rows))


def table(rows: Rows, digits: int, spreads: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Return a Markdown table of numbers; the lowest in each row is bold, and each is followed by its spread."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = []
    for label, row in rows.items():
        spread = (spreads or {}).get(label, {})
        numbers = zip(cells(row, columns, digits), columns, strict=True)
        lines.append([label, *(number + spread.get(name, "") for number, name in numbers)])
    return markdown(["", *columns], lines)


def cells(row: Row, columns: Sequence[str], digits: int) -> list[str]:
    """Return the cells of a row; the lowest number is bold."""
    best = min((value for name, value in row.items() if not is_baseline(name)), default=None)
    return [_cell(row.get(name), best, digits) for name in columns]


def _cell(value: float | None, best: float | None, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{value:,.{0 if value >= 1000 else digits}f}"
    return f"**{text}**" if value == best else text


# A chart has a background of its own, so that it can be read on a page in either scheme.
STYLE = """\
<style>
.page { fill: #fff; }
text { fill: #1f2328; stroke: #fff; stroke-width: 4px; paint-order: stroke; }
.ours { fill: #2563eb; }
.others { fill: #94a3b8; }
.baseline { fill: #cbd5e1; }
line { stroke: #94a3b8; }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; }
text { fill: #e6edf3; stroke: #0d1117; }
.ours { fill: #3b82f6; }
.others { fill: #64748b; }
.baseline { fill: #475569; }
}
</style>
"""


def chart(title: str, groups: Rows, digits: int, unit: float | None = None) -> str:
    """Return an SVG chart with bars for each group.

    The bars of a group are as long as the values are in comparison with the longest bar of the group.  If ``unit`` is
    given, all groups have the same scale, and a line marks this value.
    """
    left, width, step = 330, 420, 20
    lines, y = [f'<text x="8" y="22" font-size="15" font-weight="bold">{escape(title)}</text>'], 46
    top = y
    longest_of_all = max(max(row.values()) for row in groups.values())
    for group, row in groups.items():
        lines.append(f'<text x="8" y="{y}" font-weight="bold">{escape(group)}</text>')
        y += step
        longest = max(row.values()) if unit is None else longest_of_all
        for name, value in sorted(row.items(), key=lambda entry: entry[1]):
            kind = "ours" if name in OURS else "baseline" if is_baseline(name) else "others"
            size = max(1, round(width * max(value, 0) / longest))
            lines += [
                f'<text x="{left - 8}" y="{y}" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{left}" y="{y - 12}" width="{size}" height="15" class="{kind}"/>',
                f'<text x="{left + size + 6}" y="{y}">{value:,.{0 if value >= 100 else digits}f}</text>',
            ]
            y += step
        y += step // 2
    if unit is not None:
        x = left + round(width * unit / longest_of_all)
        lines.insert(1, f'<line x1="{x}" y1="{top}" x2="{x}" y2="{y - step}"/>')
    body = "\n".join(lines)
    across = left + width + 80
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {y}" width="{across}" height="{y}" '
        f'font-family="system-ui, sans-serif" font-size="13">\n{STYLE}'
        f'<rect width="100%" height="100%" class="page"/>\n{body}\n</svg>\n'
    )

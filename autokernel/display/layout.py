"""Tables: a plain one for short cells, and one whose rows have a line of detail below, for long ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import Box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_RULE = Box("    \n    \n ── \n    \n    \n ── \n    \n    \n")
_GAP = 2

Column = tuple[str, str] | str  # a name, or (name, "right" | "left" | "fold")
Row = tuple[Sequence[str | Text], str | Text]  # cells, detail


def table(*columns: Column, title: str = "") -> Table:
    """A table with a line under its head; columns that fold take what width the others leave."""
    made = Table(box=_RULE, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), show_edge=False)
    made.collapse_padding = True
    for column in columns:
        name, how = column if isinstance(column, tuple) else (column, "left")
        made.add_column(
            name,
            justify="right" if how == "right" else "left",
            no_wrap=how != "fold",
            overflow="fold",
            header_style="dim",
        )
    return made


def detailed_table(*columns: Column, rows: Sequence[Row], title: str = "", one_line: bool = False) -> RenderableType:
    """A table whose rows have a detail each, below the row or (`one_line`) at its end, where it is cut off if need be."""
    names = [column[0] if isinstance(column, tuple) else column for column in columns]
    right = [isinstance(column, tuple) and column[1] == "right" for column in columns]
    cells = [[_text(cell) for cell in row] for row, _ in rows]
    widths = [max([cell_len(name), *(cell_len(row[i].plain) for row in cells)]) for i, name in enumerate(names)]
    lines: list[RenderableType] = [Text(title, "bold")] if title else []
    lines.append(_line([Text(name, "dim") for name in names], widths, right))
    lines.append(Text("─" * (sum(widths) + _GAP * (len(widths) - 1)), "dim", no_wrap=True, overflow="crop"))
    for row, (_, detail) in zip(cells, rows, strict=True):
        line, more = _line(row, widths, right), _text(detail)
        if one_line:
            line.append(" " * (widths[-1] - cell_len(row[-1].plain)) if not right[-1] else "")
            line.append(" " * _GAP).append_text(more)
            line.no_wrap, line.overflow = True, "ellipsis"
        lines.append(line)
        if more.plain and not one_line:
            lines.append(Text("  ").append_text(more))
    return Group(*lines)


def _line(cells: Sequence[Text], widths: Sequence[int], right: Sequence[bool]) -> Text:
    line = Text()
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        blank = " " * (width - cell_len(cell.plain))
        last = i == len(cells) - 1
        line.append(" " * _GAP if i else "")
        line.append(blank if right[i] else "").append_text(cell).append("" if right[i] or last else blank)
    return line


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def spaced(parts: Iterable[RenderableType]) -> RenderableType:
    """One empty line between parts, and one at the end."""
    kept = [part for part in parts if not (isinstance(part, Text) and not part.plain)]
    return Group(*(item for part in kept for item in (part, "")))

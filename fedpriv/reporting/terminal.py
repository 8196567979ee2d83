"""What commands print: the user's own text as it is, in any encoding, and numbers that never break.

Nothing here, or that is printed through it, is read as rich's markup: a path may hold brackets.
"""

from __future__ import annotations

import codecs
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Timer

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

# For terminals that cannot show them.
_SPELLED = {
    "ε": "epsilon",
    "δ": "delta",
    "σ": "sigma",
    "·": ".",
    "–": "-",
    "—": "-",
    "−": "-",
    "×": "x",
    "≈": "~",
    "≤": "<=",
    "≥": ">=",
    "√": "sqrt",
    "→": "->",
    "↓": "v",
    "…": "...",
}
# What the handler of such characters is called.
_ERRORS = "fedpriv-spelled"
# Lines in a file or a pipe are as long as they need to be, up to this.
_WIDTH_OF_A_FILE = 400
# A column of text, such as a path, is folded, to no fewer characters than this.
_NARROWEST_TEXT = 12
# What takes no longer says nothing of it where there is no terminal, in seconds.
_SHORT = 2.0


def console(stderr: bool = False) -> Console:
    """Return a console for standard output or error, which reads no markup in what it prints."""
    stream = sys.stderr if stderr else sys.stdout
    columns = os.environ.get("COLUMNS", "")
    asked = int(columns) if columns.isdecimal() else 0
    width = asked or (None if stream.isatty() else _WIDTH_OF_A_FILE)
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def let_print_anything() -> None:
    """Let standard output and error spell what their encoding has no character for.

    Else an ε would end a run on a terminal that is not UTF-8, and so would, on all, the name of a
    file that is not.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # whoever calls from Python may have put another there
            stream.reconfigure(errors=_ERRORS)


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    spelled = "".join(
        _SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in text
    )
    return spelled, error.end


codecs.register_error(_ERRORS, _spelled)


def one_line(text: str) -> str:
    """Return `text` with line breaks and other control characters spelled out."""
    return "".join(c if c.isprintable() or c == " " else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    # A name that is not UTF-8 is for the stream to spell.
    return character if "\ud800" <= character <= "\udfff" else ascii(character)[1:-1]


def in_a_shell(path: Path) -> str:
    """Return `path` as a shell's command line takes it."""
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if one_line(text) != text:
        quoted = one_line(text.replace("\\", "\\\\").replace("'", "\\'"))
        return f"$'{quoted}'"
    return shlex.quote(text)


def print_lines(to: Console, *lines: str | Text) -> None:
    """Print lines as long as they are."""
    for line in lines:
        to.print(line if isinstance(line, Text) else Text(one_line(line)), soft_wrap=True)


def fitting(parts: Sequence[Text], width: int, least: int) -> Text:
    """Return `parts` on one line of `width` columns; the last ones are left out, and none is cut.

    Where not even the first `least` fit, they are on as many lines.
    """
    shown, gap = list(parts), Text("  ")
    while len(shown) > least and gap.join(shown).cell_len > width:
        shown.pop()
    line = gap.join(shown)
    return line if line.cell_len <= width else Text("\n").join(shown)


@contextmanager
def working(to: Console, what: str) -> Iterator[None]:
    """Show on a terminal that something takes its time; elsewhere say so, once it does."""
    with to.status(Text(one_line(what))) if to.is_terminal else saying(to, what):
        yield


@contextmanager
def saying(to: Console, what: str) -> Iterator[None]:
    """Say in a line that something takes its time, once it does.

    It is for what may draw a bar of its own, as reading the data does that makes synthetic speech.
    """
    said = Timer(_SHORT, print_lines, (to, f"{what} …"))
    said.daemon = True
    said.start()
    try:
        yield
    finally:
        said.cancel()


def beside(shown: bool = True) -> Console:
    """Return where progress is shown, which is standard error; nowhere where it is not `shown`."""
    made = console(stderr=True)
    made.quiet = not shown
    return made


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its head.
        text: whether it is prose or a path, to the left, which may be folded anywhere; else a cell
            is to the right, and broken between words only.
        kept: whether it is shown however narrow the terminal is.
        footer: what stands at its end.
    """

    name: str
    text: bool = False
    kept: bool = False
    footer: str = ""


class FittedTable:
    """A table that leaves columns out, the last ones first, before it would break a number.

    Where those that are `kept` do not fit either, each row is printed as lines of its own.
    """

    def __init__(
        self,
        *columns: Column,
        title: str | None = None,
        caption: str | None = None,
        heads: bool = True,
    ) -> None:
        self.columns, self.title, self.caption, self.heads = columns, title, caption, heads
        self._rows: list[tuple[tuple[Text, ...], str]] = []

    def row(self, *cells: str | Text, style: str = "") -> None:
        """Add a row, a cell a column."""
        self._rows.append((tuple(map(_text, cells)), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or its lines, for `options.max_width` columns."""
        spelled = self._spelled(options.encoding)
        yield from spelled._fitted(options)

    def _spelled(self, encoding: str) -> FittedTable:
        """Return the table as `encoding` shows it, which may take more room."""

        def text(plain: str) -> str:
            return plain.encode(encoding, _ERRORS).decode(encoding)

        def cell(one: Text) -> Text:
            return one if text(one.plain) == one.plain else Text(text(one.plain), one.style)

        columns = (
            replace(each, name=text(each.name), footer=text(each.footer)) for each in self.columns
        )
        caption = self.caption and text(self.caption)
        spelled = FittedTable(*columns, title=self.title, caption=caption, heads=self.heads)
        for cells, style in self._rows:
            spelled.row(*map(cell, cells), style=style)
        return spelled

    def _fitted(self, options: ConsoleOptions) -> RenderResult:
        shown, gap = self._shown(options.max_width)
        if shown is None:
            yield from self._as_lines()
        else:
            yield self._table(shown, gap, options.max_width)
            left_out = [c.name for i, c in enumerate(self.columns) if i not in shown]
            if left_out:
                names = ", ".join(" ".join(name.split()) for name in left_out)
                yield Text(f"(too narrow for: {names})", overflow="fold")
        if self.caption:
            yield Text(self.caption, overflow="fold")

    def _shown(self, width: int) -> tuple[list[int] | None, int]:
        """Return which columns fit into `width`, and the space between two."""
        shown = list(range(len(self.columns)))
        while True:
            for gap in (2, 1):
                if sum(map(self._narrowest, shown)) + gap * (len(shown) - 1) <= width:
                    return shown, gap
            droppable = [i for i in shown if not self.columns[i].kept]
            if not droppable:
                return None, 0
            shown.remove(droppable[-1])

    def _cells(self, index: int) -> Iterator[str]:
        column = self.columns[index]
        yield from (column.name if self.heads else "", column.footer)
        yield from (cells[index].plain for cells, _ in self._rows)

    def _widest(self, index: int) -> int:
        lines = (line for cell in self._cells(index) for line in cell.splitlines())
        return max(map(cell_len, lines), default=0)

    def _narrowest(self, index: int) -> int:
        if self.columns[index].text:
            return min(self._widest(index), _NARROWEST_TEXT)
        words = (word for cell in self._cells(index) for word in cell.split())
        return max(map(cell_len, words), default=0)

    def _table(self, shown: Sequence[int], gap: int, width: int) -> Table:
        widths = {index: self._narrowest(index) for index in shown}
        spare = width - sum(widths.values()) - gap * (len(shown) - 1)
        for index in sorted(shown, key=lambda one: self.columns[one].text):
            grown = min(spare, self._widest(index) - widths[index])
            widths[index], spare = widths[index] + grown, spare - grown
        table = Table(
            box=SIMPLE_HEAD if self.heads else None,
            show_edge=False,
            show_header=self.heads,
            show_footer=any(column.footer for column in self.columns),
            pad_edge=False,
            padding=(0, gap - 1 if self.heads else gap, 0, 0),
            title=self.title and Text(self.title),
            title_justify="left",
        )
        for index in shown:
            column = self.columns[index]
            table.add_column(
                Text(column.name),
                Text(column.footer),
                width=widths[index],
                overflow="fold",
                justify="left" if column.text or not self.heads else "right",
            )
        for cells, style in self._rows:
            table.add_row(*(cells[index] for index in shown), style=style)
        return table

    def _as_lines(self) -> Iterator[Text]:
        footer = tuple(Text(column.footer) for column in self.columns)
        rows = [*self._rows, *([(footer, "")] if any(cell.plain for cell in footer) else [])]
        if self.title:
            yield Text(self.title, overflow="fold")
        for cells, style in rows:
            for column, cell in zip(self.columns, cells, strict=True):
                name = " ".join(column.name.split())
                # Broken between words, of which a number is one.
                line = Text.assemble(f"{name}: " if name else "", cell, style=style)
                line.overflow = "fold"
                yield line
            yield Text()


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)

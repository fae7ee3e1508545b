"""A table, and its forms: Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from html import escape
from typing import Any

from cnnopt.groups import Spread


@dataclass(frozen=True)
class Column:
    """The heading of a column, and how its numbers are written: a format such as ``.2f``, and what follows it."""

    title: str
    form: str = ""
    unit: str = ""
    spread: bool = False

    def text(self, value: Any) -> str:
        """A cell as people read it."""
        if value is None:
            return ""
        if isinstance(value, Spread):
            mean = f"{value.mean:{self.form}}{self.unit}"
            return mean if value.deviation is None else f"{mean} ± {value.deviation:{self.form.lstrip('+')}}"
        return f"{value:{self.form}}{self.unit}" if isinstance(value, int | float) else str(value)


@dataclass(frozen=True)
class Table:
    """A table. ``name`` is that of its files. A cell is a text, a number, a Spread or None."""

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: list[tuple[Any, ...]]

    def shown(self) -> tuple[list[Column], list[list[str]]]:
        """The columns that have a value in some row, and the rows as people read them."""
        filled = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        columns = [self.columns[i] for i in filled]
        return columns, [[self.columns[i].text(row[i]) for i in filled] for row in self.rows]

    def markdown(self) -> str:
        """The table alone, without its title."""
        columns, rows = self.shown()
        head = [[column.title for column in columns], ["---"] * len(columns)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [*head, *rows])

    def csv(self) -> str:
        """All columns, with numbers in full. A column of spreads becomes three: mean, deviation and number of seeds."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head: list[str] = []
        for column in self.columns:
            head.append(column.title)
            if column.spread:
                head += [f"{column.title}, deviation", f"{column.title}, seeds"]
        writer.writerow(head)
        for row in self.rows:
            cells: list[Any] = []
            for column, cell in zip(self.columns, row, strict=True):
                if isinstance(cell, Spread):
                    cells += [cell.mean, cell.deviation, cell.count]
                else:
                    cells += [cell, *([None, None] if column.spread else [])]
            writer.writerow(cells)
        return text.getvalue()

    def latex(self) -> str:
        """A table environment, for the package booktabs."""
        columns, rows = self.shown()
        kinds = "".join("r" if column.form else "l" for column in columns)
        lines = [[column.title for column in columns], *rows]
        head, *body = [" & ".join(map(_latex, cells)) + r" \\" for cells in lines]
        return "\n".join(
            [
                r"\begin{table}", r"\centering", rf"\caption{{{_latex(f'{self.title}. {self.note}')}}}",
                rf"\label{{tab:{self.name}}}", rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body,
                r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
            ]
        )  # fmt: skip

    def html(self) -> str:
        """The table and its note, in the classes of cnnopt/export/page.html."""
        columns, rows = self.shown()
        kinds = [' class="n"' if column.form else "" for column in columns]
        head = "".join(f"<th{kind}>{escape(column.title)}</th>" for kind, column in zip(kinds, columns, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>"
            for row in rows
        )
        return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div><p class=small>{escape(self.note)}</p>"


def _latex(text: str) -> str:
    for letter in "&%#_$":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("±", r"$\pm$")

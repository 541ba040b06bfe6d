"""The tables that commands print, of `ddptrain compare` a row for each run, also for a pipe."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ddptrain.observe.comparison import Comparison, RunRecord
from ddptrain.observe.values import NOT_SET, digits, printable, shown
from ddptrain.screen import short

UNLIMITED = 1_000_000


@dataclass(frozen=True)
class Column:
    """A header and a cell for each row, in their order."""

    header: str
    cells: list[str]
    is_number: bool = False
    is_dispensable: bool = False


def render(comparison: Comparison) -> str:
    """The table, whole in a pipe; what a terminal has no room for is named below it."""
    console = Console(highlight=False)
    columns = _columns(comparison, is_narrow=False)
    left_out: list[str] = []
    if console.is_terminal and _width(console, columns) > console.width:
        columns = _columns(comparison, is_narrow=True)
        while columns[-1].is_dispensable and _width(console, columns) > console.width:
            left_out.insert(0, columns.pop().header.replace("\n", ""))
    lines = _lines(console, columns, [comparison.is_best(r) for r in comparison.records])
    if left_out:
        lines += ["", f"no room for {', '.join(left_out)}; a pipe (| cat) gets all columns"]
    return "\n".join(lines)


def plain(columns: list[Column]) -> str:
    """A table as it is, however wide."""
    console = Console(highlight=False)
    return "\n".join(_lines(console, columns, [False] * len(columns[0].cells)))


def _lines(console: Console, columns: list[Column], is_best: list[bool]) -> list[str]:
    console.width = max(console.width, _width(console, columns))
    with console.capture() as captured:
        console.print(_table(columns, is_best))
    return [line.rstrip() for line in captured.get().splitlines()]


def _width(console: Console, columns: list[Column]) -> int:
    unlimited = console.options.update_width(UNLIMITED)
    return console.measure(
        _table(columns, [False] * len(columns[0].cells)), options=unlimited
    ).maximum


def _table(columns: list[Column], is_best: list[bool]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        justify: JustifyMethod = "right" if column.is_number else "left"
        table.add_column(Text(column.header), justify=justify, no_wrap=True)
    for row, is_marked in enumerate(is_best):
        cells = [Text(column.cells[row]) for column in columns]
        table.add_row(*cells, style="bold green" if is_marked else "")
    return table


def _columns(comparison: Comparison, is_narrow: bool) -> list[Column]:
    """``is_narrow`` breaks headers at dots, and leaves out the folder that all runs are in."""
    records = comparison.records
    columns = []
    if comparison.metric is not None:
        columns.append(Column("", ["*" if comparison.is_best(r) else "" for r in records]))
    names = [comparison.name(r) if is_narrow else short(r.run.path) for r in records]
    columns.append(Column("run", list(map(printable, names))))
    if not all(record.is_completed for record in records):
        columns.append(Column("status", [printable(record.progress) for record in records]))
    for key in comparison.changed:
        cells = [shown(record.config, key) for record in records]
        columns.append(Column(printable(key), cells, comparison.is_numeric(key)))
    for metric in comparison.metrics:
        is_first = metric == comparison.metric
        cells = [_of(record, metric) for record in records]
        columns.append(Column(printable(metric), cells, True, not is_first))
        if is_first and any(map(comparison.best_over, records)):
            cells = [_best(comparison, record) for record in records]
            columns.append(Column(printable(f"best {metric}"), cells, True))
    if is_narrow:
        broken = re.compile(r"(?<=[./ ])(?=\S)")
        columns = [replace(column, header=broken.sub("\n", column.header)) for column in columns]
    return columns


def _of(record: RunRecord, metric: str) -> str:
    return digits(record.metrics[metric]) if metric in record.metrics else NOT_SET


def _best(comparison: Comparison, record: RunRecord) -> str:
    best = comparison.best_over(record)
    return f"{digits(best[0])}, step {best[1]}" if best else NOT_SET


def sentence(comparison: Comparison) -> str:
    """What is the same in all runs, and what the table is sorted by."""
    order = "in the order given"
    if metric := comparison.metric:
        extreme = "largest" if comparison.larger_is_better else "smallest"
        order = f"{extreme} {printable(metric)} first (*)"
    if len(comparison.given) == 1:
        return f"{comparison.title}; with one more there is something to compare"
    if comparison.changed:
        return f"{comparison.title}, {order}; what is not shown of their configs is the same"
    return f"all {comparison.title} have the same config; {order}"

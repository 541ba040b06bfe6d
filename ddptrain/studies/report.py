"""The report of a study: a page that holds all of it, and Markdown with its pictures beside."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from ddptrain.errors import Refused, TrainingError
from ddptrain.files import LASTING, replace_bytes, replace_text
from ddptrain.screen import short
from ddptrain.studies.outcome import Made
from ddptrain.studies.pictures import draw
from ddptrain.studies.plan import Comparison
from ddptrain.studies.study import Study
from ddptrain.studies.table import NONE, plain, rows

PAGE, TEXT = "report.html", "report.md"
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --faint: #6b7280; --line: #d9dde3;
  --bad: #c92a2a; --band: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --ink: #e3e6ea; --faint: #98a1ad;
  --line: #343a42; --bad: #ff8787; --band: #1d2126; } }
body { background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; }
img { max-width: 100%; display: block; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; }
.failed { border-left: 3px solid var(--bad); padding-left: .8rem; overflow-wrap: anywhere; }
details { margin: 1rem 0; color: var(--faint); } summary { cursor: pointer; }
dt { margin-top: .8rem; color: var(--ink); font-weight: 600; } dd { margin: 0 0 0 1rem; }
code { font: .82rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; background: var(--band);
  padding: .05rem .25rem; border-radius: 3px; }
"""


@dataclass(frozen=True)
class Section:
    """A comparison with what came of its runs."""

    comparison: Comparison
    made: list[Made]

    @property
    def picture(self) -> str:
        return f"{self.comparison.name}.png"

    @property
    def table(self) -> list[list[str]]:
        return rows(self.comparison, self.made)

    @property
    def failures(self) -> list[tuple[str, str]]:
        """The name of each run that failed, and what the framework said."""
        return [(each.planned.name, each.why) for each in self.made if each.why]


def write_report(study: Study) -> str:
    """Write the report from the directories of the runs; return its tables, for the screen.

    Raises ``TrainingError`` if the folder does not take it.
    """
    sections = [
        Section(part, [study.made(each) for each in part.runs]) for part in study.plan.comparisons
    ]
    pictures = {part.picture: draw(part.comparison.picture, part.made) for part in sections}
    try:
        for name, png in pictures.items():
            replace_bytes(study.folder / name, png)
        replace_text(study.folder / TEXT, markdown(study, sections))
        replace_text(study.folder / PAGE, page(study, sections, pictures))
    except OSError as error:
        kind = Refused if isinstance(error, LASTING) else TrainingError
        raise kind(f"{study.folder} cannot be written to: {error.strerror}") from error
    told = [f"{part.comparison.title}\n\n{plain(part.table)}" for part in sections]
    where = [f"report       {short(study.folder / name)}" for name in (PAGE, TEXT)]
    return "\n\n".join(["", *told, "\n".join(where)])


def markdown(study: Study, sections: list[Section]) -> str:
    """The report as Markdown; pictures are named as files beside it."""
    parts = [f"# {study.plan.title}", study.plan.text, *_again(study)]
    for section in sections:
        comparison = section.comparison
        head, *body = ([_cell(cell) for cell in row] for row in section.table)
        ruler = ["---", *["---:"] * (len(head) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (head, ruler, *body)]
        parts += [
            f"## {comparison.title}",
            comparison.text,
            f"![{comparison.title}]({section.picture})",
            "\n".join(lines),
            *(f"`{name}` ended with:\n\n> {_cell(why)}" for name, why in section.failures),
            "\n".join(_listed(section)),
        ]
    return "\n\n".join(parts) + "\n"


def _again(study: Study) -> Iterator[str]:
    """What makes all of it again."""
    overrides = study.arguments_of_user()
    yield f"```console\n$ ddptrain study {study.plan.name}{overrides}\n```"


def _cell(text: str) -> str:
    """Text that means nothing to Markdown."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _listed(section: Section) -> Iterator[str]:
    for made in section.made:
        digest = made.result.get("weights_sha256") or NONE
        yield f"- **{made.planned.name}**, in `{short(made.run.path)}`, weights_sha256 `{digest}`:"
        yield f"  `{made.command}`"


def page(study: Study, sections: list[Section], pictures: dict[str, bytes]) -> str:
    """The report as one HTML file that needs no other."""
    title = escape(study.plan.title)
    again = escape(f"ddptrain study {study.plan.name}{study.arguments_of_user()}")
    body = [
        f"<h1>{title}</h1>",
        f"<p>{escape(study.plan.text)}</p>",
        f"<p><code>{again}</code></p>",
    ]
    for section in sections:
        body += _section(section, pictures[section.picture])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _section(section: Section, png: bytes) -> Iterator[str]:
    comparison = section.comparison
    title, (head, *body) = escape(comparison.title), section.table
    yield f"<h2>{title}</h2>\n<p>{escape(comparison.text)}</p>"
    yield f'<img alt="{title}" src="data:image/png;base64,{b64encode(png).decode()}">'
    lines = [_row("th", head), *(_row("td", row) for row in body)]
    yield '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
    for name, why in section.failures:
        yield f'<p class="failed"><code>{escape(name)}</code> ended with: {escape(why)}</p>'
    yield "<details><summary>Directories, weights and commands of these runs</summary><dl>"
    for made in section.made:
        digest = escape(str(made.result.get("weights_sha256") or NONE))
        name, where = escape(made.planned.name), escape(short(made.run.path))
        yield (
            f"<dt>{name}</dt><dd>in <code>{where}</code>, weights_sha256 <code>{digest}</code><br>"
            f"<code>{escape(made.command)}</code></dd>"
        )
    yield "</dl></details>"


def _row(kind: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

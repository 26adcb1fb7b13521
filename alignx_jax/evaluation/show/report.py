"""The results of an evaluation as a page, as TensorBoard data, and as a table for the terminal.

The page needs nothing but itself: its pictures are inline
SVG, and it loads no script, font or style.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import jinja2
from rich import box
from rich import table as rich_table
from rich.text import Text
from tensorboardX import SummaryWriter

from alignx_jax import storage
from alignx_jax.data.languages import language_name
from alignx_jax.evaluation.rows import Results, direction_codes, direction_name
from alignx_jax.evaluation.show import cells, figures, tables, verdict

_SECTIONS = {
    "verdict": "In short",
    "models": "Models side by side",
    "depth": "Align, then diverge",
    "measures": "Other measures over depth",
    "by_language": "Retrieval by language",
    "matrix": "Every language with every other",
    "projections": "Sentences in the plane",
    "losses": "Training",
    "translation": "Translation",
    "forgetting": "Forgetting",
    "language_tables": "Language by language",
    "samples": "Sample outputs",
    "definitions": "Definitions",
    "about": "How this was made",
}


def write(results: Results, folder: pathlib.Path) -> pathlib.Path:
    """`report.html` in `folder`; the same results give the same bytes. Returns its path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignx_jax.evaluation.show", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["minus"] = lambda text: re.sub(r"(?<![\w-])-(?=\d)", "−", text)
    page = environment.get_template("report.html.jinja").render(_context(results))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    storage.write(path, page)
    return path


def _context(results: Results) -> dict:
    """Everything the template names."""
    found = {
        "verdict": verdict.verdicts(results),
        "models": tables.overview(results),
        "depth": figures.depth(results),
        "measures": figures.measures(results),
        "by_language": figures.by_language(results),
        "matrix": figures.matrices(results),
        "projections": figures.projections(results),
        "losses": figures.losses(results),
        "balance": tables.balance(results),
        "translation": _translation(results),
        "controlled": [(pair[1], tables.overview(results.against_control(pair))) for pair in results.controls],
        "forgetting": [table for table in (tables.home(results), tables.tasks(results)) if table],
        "language_tables": tables.by_language(results),
        "samples": _samples(results),
    }
    return {
        **found,
        "contents": {key: title for key, title in _SECTIONS.items() if found.get(key, True)},
        "baseline": results.base and results.base.name,
        "colours": {key.text: key.colour for key in figures.model_keys(results)},
        "config": dict(_flat(results.config)),
        "languages": [f"{code} {language_name(code)}" for code in results.sentences.languages],
        "mexa_sentences": tables.mexa_sentences(results),
        "pivot": language_name(results.sentences.pivot),
        "results": results,
        "tokenization": tables.tokenization(results),
        "warnings": _warnings(results),
        "words": {"better": "better", "worse": "worse", "same": "cannot tell", "chance": "chance", "": "no interval"},
    }


def _translation(results: Results) -> dict | None:
    averages = tables.translation_averages(results)
    if averages is None or results.translation is None:
        return None
    found = (tables.translation_directions(results, metric) for metric in tables.metrics(results))
    main, *others = (table for table in found if table)
    return {"averages": averages, "main": main, "others": others, "pictures": figures.translations(results)}


def _samples(results: Results) -> list[dict]:
    """Each with its direction's name and two languages."""
    return [
        {"title": direction_name(sample.direction), "codes": direction_codes(sample.direction), "of": sample}
        for sample in (results.translation.samples if results.translation else ())
    ]


def _flat(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """`evaluation.limit` and its value, of settings inside settings."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


_COLOURS = {"better": "green", "worse": "red", "same": "dim", "chance": "dim", "": ""}


def terminal_table(results: Results) -> rich_table.Table:
    """Models as columns: what is compared first, with its change against the baseline and the 95 % interval of that."""
    overview, base = tables.overview(results), results.base
    shown = rich_table.Table(title=overview.title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    shown.caption = f"beside a value its change against {base.name}, below it the 95% interval" if base else None
    shown.add_column("", min_width=14)
    for name in overview.head[1:]:
        shown.add_column(Text(name), justify="right")
    for line in overview.lines:
        if line.cells:
            shown.add_row(Text(line.label), *(_terminal_cell(cell) for cell in line.cells))
        else:
            shown.add_section()
            shown.add_row(Text(line.label, style="bold"))
    return shown


def terminal_notes(results: Results) -> list[tuple[str, str]]:
    """Lines below the table, each with what it is: what the pair losses did, what scores were made with, what is
    missing or in doubt."""
    losses = [("losses", f"{found.model}. {found.text}") for found in verdict.of_losses(results)]
    made = results.translation
    found = [("scores", f"{name} {text}") for name, text in made.signatures.items()] if made else []
    notes = [*(made.notes if made else ()), *_warnings(results)]
    return list(dict.fromkeys([*losses, *found, *(("note", note) for note in notes)]))


def _warnings(results: Results) -> list[str]:
    return [*results.notes, *verdict.warnings(results)]


def _terminal_cell(cell: cells.Cell) -> Text:
    text = Text(cell.text)
    text.append(f" {cell.change}" if cell.change else "", style=_COLOURS[cell.mark])
    interval = cell.change_interval if cell.change else cell.interval
    return text.append(f"\n{interval}" if interval else "", style="dim")


def to_tensorboard(results: Results, folder: pathlib.Path) -> None:
    """Every measure over the layers (steps are layers; a folder for each model), pictures, and tables as text.

    Args:
      folder: new.
    """
    for model in results.models:
        with SummaryWriter(str(folder / re.sub(r"[^\w -]", "_", model.name))) as board:
            for key, curve in figures.curves(results, model).items():
                for layer, value in enumerate(curve):
                    board.add_scalar(f"layers/{key}", float(value), layer)
    with SummaryWriter(str(folder)) as board:
        for group in _groups(results):
            board.add_image(group.key, group.pixels(), dataformats="HWC")
        for table in _tables(results):
            board.add_text(table.title, _markdown(table))
        for found in verdict.verdicts(results):
            board.add_text(f"verdict/{found.title}", found.text)


def _groups(results: Results) -> list[figures.Group]:
    """Every picture of the page."""
    single = [figures.depth, figures.by_language, figures.matrices, figures.losses, figures.translations]
    several = [*figures.measures(results), *figures.projections(results)]
    return [group for group in [*(make(results) for make in single), *several] if group and group.panels]


def _tables(results: Results) -> list[tables.Table]:
    """Every table of the page, but for the single metrics of translation."""
    single = [tables.overview, tables.translation_averages, tables.home, tables.tasks]
    return [*(table for make in single if (table := make(results))), *tables.by_language(results)]


def _markdown(table: tables.Table) -> str:
    """The table as TensorBoard's text shows it."""

    def written(*cells):
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    text = [written(*table.head), written(*("---" for _ in table.head))]
    for line in table.lines:
        cells = (" ".join(filter(None, (c.text, c.interval, c.change, c.change_interval))) for c in line.cells)
        empty = ("" for _ in table.head[1:])
        text.append(written(line.label, *cells) if line.cells else written(f"**{line.label}**", *empty))
    return "\n".join(text)

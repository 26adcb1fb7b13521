"""The study's results: from its runs and measurements to benchmarks/results, tables and pictures.

python -m benchmarks.study.tables --runs FOLDER --model BASE/model [--to choices]
python -m benchmarks.study.tables

The first gathers the measurements of all runs: those of the ablation in benchmarks/results/study.json, with
--to=choices those of the choices, which have a base model of their own, in study_choices.json. Runs that are
there stay beside those that are new; a seed has one base model. Both commands write the tables and pictures of
docs/evidence.md from the two files.

Every comparison is paired by seed: two arms with the same seed saw the same data in the same order. A difference is
the mean over seeds with its 95 % interval by Student's t; it says how much another order of the data and other first
weights of the classifier would change it, not other sentences; another base model only as far as seeds have different
ones. The interval of the choices is of the variance that all of them have together.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib.figure
import numpy as np
import scipy.stats
import tyro

from benchmarks import record
from benchmarks.study import arms

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = {
    part: ROOT / f"benchmarks/results/{file}.json"
    for part, file in (("ablation", "study"), ("choices", "study_choices"))
}
PAGE, IMAGES = ROOT / "docs/evidence.md", ROOT / "docs/images"
SETS = "FLORES-200", "NTREX-128"


@dataclasses.dataclass(frozen=True)
class Options:
    runs: pathlib.Path | None = None
    """Folder of the runs, with `measured.json` in each; unset: the committed results are used."""
    model: pathlib.Path | None = None
    """The base model."""
    to: Literal[tuple(RESULTS)] = "ablation"
    """The part of the study that they are."""


def summary(measured: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The figures of a stage that tables and pictures are made of, in % but for bits a byte; `layer` was aligned."""
    found: dict[str, Any] = {"aligned layer": layer}
    for name, of in measured["alignment"].items():
        found[f"retrieval, {name}"] = 100 * _mean(curve[layer] for curve in of["retrieval"].values())
        found[f"retrieval by language, {name}"] = {code: 100 * curve[layer] for code, curve in of["retrieval"].items()}
        found[f"retrieval by layer, {name}"] = (100 * np.mean(list(of["retrieval"].values()), axis=0)).tolist()
    for name in SETS:
        of = measured["alignment"][name]
        found[f"MEXA, {name}"] = 100 * _mean(curve[layer] for curve in of["mexa"].values())
        found[f"meaning, aligned layer, {name}"] = 100 * of["meaning_variance"][layer]
        found[f"language, aligned layer, {name}"] = 100 * of["language_variance"][layer]
        found[f"language, last layer, {name}"] = 100 * of["language_variance"][-1]
        found[f"probe, last layer, {name}"] = 100 * of["language_probe"][-1]
        for share in ("language", "meaning"):
            found[f"{share} by layer, {name}"] = (100 * np.array(of[f"{share}_variance"])).tolist()
    if "translation" in measured:
        bits = {code: of["bits_per_byte"] for code, of in measured["perplexity"].items()}
        found |= {"perplexity": {code: of["value"] for code, of in measured["perplexity"].items()}}
        found["bits a byte"] = dict(bits)
        found |= {"bits a byte, en": bits.pop("en"), "bits a byte, others": _mean(bits.values())}
        right = dict(measured["choices"])
        found |= {"XCOPA, en": 100 * right.pop("en"), "XCOPA, others": 100 * _mean(right.values())}
        by_direction = {pair: of for pair, of in measured["translation"].items() if "fi" not in pair.split("-")}
        groups = {
            "en-x": [of for pair, of in by_direction.items() if pair.startswith("en-")],
            "x-en": [of for pair, of in by_direction.items() if pair.endswith("-en")],
            "x-y": [of for pair, of in by_direction.items() if "en" not in pair.split("-")],
        }
        for group, scores in groups.items():
            found[f"chrF++, {group}"] = _mean(of["chrF++"] for of in scores)
            for rate in ("off_target", "copy", "empty"):
                found[f"{rate.replace('_', '-')}, {group}"] = 100 * _mean(of[rate] for of in scores if rate in of)
        found["chrF++"] = {pair: of["chrF++"] for pair, of in measured["translation"].items()}
    return found


def _mean(values) -> float:
    return float(np.mean(list(values)))


def collect(options: Options) -> dict[str, Any]:
    """The contents of a file of results."""
    base = _read(options.model.parent / "measured.json")["base"]
    depth = len(base["alignment"][SETS[0]]["language_probe"]) - 1
    found: dict[str, Any] = {}
    for (arm, seed), done in arms.finished(options.runs).items():
        file = options.runs / arm / str(seed) / "measured.json"
        if not file.is_file():
            continue
        layer = done["stage1"]["config"]["objective"]["contrastive"]["layer"] or depth // 2
        stages = {stage: summary(of, layer) for stage, of in _read(file).items()}
        for stage, of in stages.items():
            of["training"] = {key: done[stage][key] for key in ("steps", "tokens", "pairs", "seconds", "fill")}
            of["validation"] = done[stage]["after"]
        found.setdefault(arm, {})[str(seed)] = stages
    model = summary(base, depth // 2) | {"heldout": _read(options.model.parent / "heldout.json")}
    seeds = sorted({seed for of in found.values() for seed in of})
    return {"bases": [record.of_this_run("study.tables") | {"seeds": seeds} | model], "arms": found}


def _read(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def added(found: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """`earlier` and the runs of `found`. Bases are the same one if their held-out losses are, to the last digit.

    Raises:
      SystemExit: a seed that has runs of two base models, which cannot be paired.
    """
    (new,) = found["bases"]
    same = [of for of in earlier["bases"] if of["heldout"] == new["heldout"]]
    others = [of for of in earlier["bases"] if of["heldout"] != new["heldout"]]
    seeds = sorted({seed for of in [new, *same] for seed in of["seeds"]})
    if twice := [seed for of in others for seed in of["seeds"] if seed in seeds]:
        sys.exit(
            f"the results have runs of seed {', '.join(twice)} from another base model; give benchmarks.study.arms "
            "--seeds that they have not, or delete the file of results"
        )
    both = {arm: earlier["arms"].get(arm, {}) | found["arms"].get(arm, {}) for arm in arms.ARMS}
    return {
        "bases": sorted([*others, new | {"seeds": seeds}], key=lambda of: of["seeds"]),
        "arms": {arm: dict(sorted(of.items())) for arm, of in both.items() if of},
    }


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean over seeds of arm minus reference, with its 95 % interval; NaN where there is one seed."""

    value: float
    low: float
    high: float


def paired(values: Sequence[float]) -> Difference:
    """The mean of differences, one a seed, and its interval by Student's t."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Difference(mean, np.nan, np.nan)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Difference(mean, mean - half, mean + half)


def difference(results: Mapping[str, Any], arm: str, reference: str, *path: str) -> Difference | None:
    """Arm minus reference, over the seeds that both have, of the figure at `path` in a run's stages."""
    values = differences(results, arm, reference, *path)
    return paired(values) if values else None


def differences(results: Mapping[str, Any], arm: str, reference: str, *path: str) -> list[float]:
    """As `difference`, of each seed."""
    ours, theirs = results["arms"].get(arm, {}), results["arms"].get(reference, {})
    return [_at(ours[seed], path) - _at(theirs[seed], path) for seed in sorted(set(ours) & set(theirs))]


def _at(run: Mapping[str, Any], path: Sequence[str]) -> float:
    return functools.reduce(lambda of, name: of[name], path, run)


ALIGNMENT = (
    *(f"retrieval, {name}" for name in (*SETS, "Tatoeba")),
    *(f"MEXA, {name}" for name in SETS),
    "meaning, aligned layer, FLORES-200",
    "language, aligned layer, FLORES-200",
    "language, last layer, FLORES-200",
    "probe, last layer, FLORES-200",
)
USE = (
    "bits a byte, en",
    "bits a byte, others",
    *(f"chrF++, {group}" for group in ("en-x", "x-en", "x-y")),
    *(f"off-target, {group}" for group in ("en-x", "x-en", "x-y")),
    "XCOPA, en",
    "XCOPA, others",
)
OF_CHOICES = (
    ("stage1", "meaning, aligned layer, FLORES-200"),
    ("stage1", "retrieval, NTREX-128"),
    ("stage2", "meaning, aligned layer, FLORES-200"),
    ("stage2", "retrieval, NTREX-128"),
    ("stage2", "language, last layer, FLORES-200"),
    ("stage2", "off-target, en-x"),
    ("stage2", "off-target, x-en"),
    ("stage2", "chrF++, x-en"),
    ("stage2", "bits a byte, en"),
    ("stage2", "bits a byte, others"),
)


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the ablation in docs/evidence.md, in Markdown, by name."""
    compared = [(arm, "next-token") for arm in arms.ABLATION if arm != "next-token"] + [("alignx", "contrastive")]
    found = {"base": _table_of_base(results)}
    for name, stage, measures in (
        ("stage 1", "stage1", ALIGNMENT),
        ("stage 2", "stage2", ALIGNMENT + USE),
    ):
        rows = [
            [measure, _number(of_base(results, measure), measure), _mean_cell(results, "next-token", stage, measure)]
            + [_cell(difference(results, *pair, stage, measure), measure) for pair in compared]
            for measure in measures
        ]
        found[name] = _markdown(["", "base", "next-token", *(" − ".join(pair) for pair in compared)], rows)
    found["languages"] = _languages(results)
    return found


def of_choices(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the choices beyond the paper: differences from alignx, whose own row has the range of its seeds."""
    head = ["", "seeds", *(f"{measure}, {stage[:-1]} {stage[-1]}" for stage, measure in OF_CHOICES)]
    rows = [["base", "", *(_number(of_base(results, measure), measure) for _, measure in OF_CHOICES)]]
    rows.append(["alignx", _seeds(results, "alignx"), *(_range(results, "alignx", *m) for m in OF_CHOICES)])
    halves = [half_width(results, "alignx", *path) for path in OF_CHOICES]
    numbers = set()
    for arm in [arm for arm in results["arms"] if arm != "alignx"]:
        found = [differences(results, arm, "alignx", *path) for path in OF_CHOICES]
        n, cells = len(found[0]), []
        for values, half, (_, measure) in zip(found, halves, OF_CHOICES, strict=True):
            text = _signed(_mean(values), measure)
            cells.append(f"**{text}**" if abs(_mean(values)) > half / np.sqrt(n) else text)
        numbers.add(n)
        rows.append([arm, str(n), *cells])
    for n in sorted(numbers) if np.isfinite(halves).all() else ():
        widths = [f"±{_number(half / np.sqrt(n), of)}" for (_, of), half in zip(OF_CHOICES, halves, strict=True)]
        rows.append([f"95 % interval of {n} seed{'s' * (n > 1)}", str(n), *widths])
    return {"choices base": _table_of_base(results), "choices": _markdown(head, rows)}


def half_width(results: Mapping[str, Any], reference: str, *path: str) -> float:
    """Half of the 95 % interval of an arm minus `reference` at one seed; over sqrt(n) that of the mean of n seeds.

    By Student's t, with the variance over seeds that all arms with several seeds have together, since each by itself
    has too few; infinite where there is none.
    """
    found = [differences(results, arm, reference, *path) for arm in results["arms"] if arm != reference]
    free = sum(len(values) - 1 for values in found if values)
    if not free:
        return np.inf
    squares = sum(np.sum((np.array(values) - np.mean(values)) ** 2) for values in found if values)
    return float(scipy.stats.t.ppf(0.975, free) * np.sqrt(squares / free))


def of_base(results: Mapping[str, Any], *path: str) -> Any:
    """The base model's figure, or curve, at `path`: the mean of several."""
    return np.mean([_at(of, path) for of in results["bases"]], axis=0).tolist()


def _table_of_base(results: Mapping[str, Any]) -> str:
    rows, several = [], len(results["bases"]) > 1
    for base in results["bases"]:
        of = f" (seed{'s' * (len(base['seeds']) > 1)} {', '.join(base['seeds'])})" if several else ""
        rows.append([f"perplexity{of}", *(f"{x['perplexity']:.0f}" for x in base["heldout"].values())])
        rows.append([f"bits a byte{of}", *(f"{x['bits_per_byte']:.2f}" for x in base["heldout"].values())])
    return _markdown(["", *results["bases"][0]["heldout"]], rows)


def _languages(results: Mapping[str, Any]) -> str:
    """Where AlignX differs from next-token-only training, language by language, the weakest of the base model first.

    The last row has Spearman's rank correlation of each column with the base model's retrieval, over languages.
    """
    measure = "retrieval by language, FLORES-200"
    retrieval = {code: of_base(results, measure, code) for code in results["bases"][0][measure]}
    codes = sorted(retrieval, key=retrieval.get)

    def paths(code: str) -> dict[str, tuple[str, str]]:
        return {f"retrieval, {name}": (f"retrieval by language, {name}", code) for name in SETS} | {
            "chrF++ from English": ("chrF++", f"en-{code}"),
            "chrF++ into English": ("chrF++", f"{code}-en"),
            "bits a byte": ("bits a byte", code),
        }

    found = {
        code: {n: difference(results, "alignx", "next-token", "stage2", *path) for n, path in paths(code).items()}
        for code in codes
    }
    rows = [
        [
            code,
            f"{retrieval[code]:.1f}",
            f"{of_base(results, 'perplexity', code):.0f}",
            *(_cell(d, name) for name, d in of.items()),
        ]
        for code, of in found.items()
    ]
    base, columns = [retrieval[code] for code in codes], list(found[codes[0]])
    ranks = [scipy.stats.spearmanr(base, [of[name].value for of in found.values()]).statistic for name in columns]
    rows.append(["rank correlation with the base's retrieval", "", "", *(_signed(rank, "rank") for rank in ranks)])
    return _markdown(["", "base: retrieval", "base: perplexity", *columns], rows)


def _seeds(results: Mapping[str, Any], arm: str) -> str:
    return str(len(results["arms"][arm]))


def _mean_cell(results: Mapping[str, Any], arm: str, stage: str, measure: str) -> str:
    return _number(_mean(run[stage][measure] for run in results["arms"][arm].values()), measure)


def _range(results: Mapping[str, Any], arm: str, stage: str, measure: str) -> str:
    """The mean over seeds, and the least and greatest."""
    values = [run[stage][measure] for run in results["arms"][arm].values()]
    low, high = (_number(of(values), measure) for of in (min, max))
    return f"{_mean_cell(results, arm, stage, measure)} ({low}–{high})"


def _number(value: float, measure: str) -> str:
    return f"{value:.{3 if 'bits' in measure else 2 if measure == 'rank' else 1}f}"


def _cell(of: Difference | None, measure: str) -> str:
    """The difference, its interval, and bold where the interval leaves 0 out."""
    if of is None:
        return ""
    text = _signed(of.value, measure)
    if np.isnan(of.low):
        return text
    text = f"{text} [{_signed(of.low, measure)}, {_signed(of.high, measure)}]"
    return f"**{text}**" if of.low > 0 or of.high < 0 else text


def _signed(value: float, measure: str) -> str:
    return ("+" if value >= 0 else "−") + _number(abs(value), measure)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


COLOURS = {"base": "#767676", "next-token": "#1f77b4", "contrastive": "#2ca02c", "language-matching": "#9467bd"} | {
    "alignx": "#d62728"
}


def align_then_diverge(results: Mapping[str, Any]) -> matplotlib.figure.Figure:
    """Retrieval, and the share of variance between languages, over depth: the base model and the four arms."""
    figure = matplotlib.figure.Figure(figsize=(10, 6.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    curves = {"retrieval by layer, FLORES-200": "retrieval, accuracy@1 (%)"} | {
        "language by layer, FLORES-200": "variance between languages (%)"
    }
    for row, (curve, label) in zip(axes, curves.items(), strict=True):
        for axis, stage in zip(row, ("stage1", "stage2"), strict=True):
            axis.plot(of_base(results, curve), color=COLOURS["base"], linestyle="--", label="base model")
            for arm in arms.ABLATION:
                seeds = np.array([run[stage][curve] for run in results["arms"].get(arm, {}).values()])
                if len(seeds):
                    axis.plot(seeds.mean(axis=0), color=COLOURS[arm], label=arm, linewidth=1.8)
                    axis.fill_between(range(seeds.shape[1]), seeds.min(0), seeds.max(0), color=COLOURS[arm], alpha=0.2)
            axis.axvline(results["bases"][0]["aligned layer"], color="#bbbbbb", linewidth=0.8, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(label)
    for axis, title in zip(axes[0], ("after stage 1", "after stage 2"), strict=True):
        axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("layers run (the grey line is the aligned layer)")
    axes[0, 0].legend(frameon=False)
    return figure


ALIGNED = {
    "layer-2": ("layer 2", "#1f77b4"),
    "alignx": ("layer 4 (alignx)", COLOURS["alignx"]),
    "layer-6": ("layer 6", "#2ca02c"),
    "separate": ("layer 4, each sentence by itself", "#9467bd"),
}
"""Of arms, where they are aligned, and a colour."""


def aligned_layers(results: Mapping[str, Any]) -> matplotlib.figure.Figure:
    """The share of variance that is meaning, over depth, for each place that the contrastive loss was put on.

    Curves are means over the seeds that all of them have.
    """
    figure = matplotlib.figure.Figure(figsize=(10, 3.6), layout="constrained")
    axes, curve = figure.subplots(1, 2, sharey=True), "meaning by layer, FLORES-200"
    shown = [arm for arm in ALIGNED if arm in results["arms"]]
    seeds = set.intersection(*(set(results["arms"][arm]) for arm in shown))
    for axis, stage, title in zip(axes, ("stage1", "stage2"), ("after stage 1", "after stage 2"), strict=True):
        axis.plot(of_base(results, curve), color=COLOURS["base"], linestyle="--", label="base model")
        for arm in shown:
            runs, (label, colour) = [results["arms"][arm][seed] for seed in sorted(seeds)], ALIGNED[arm]
            layer, values = runs[0][stage]["aligned layer"], np.mean([run[stage][curve] for run in runs], axis=0)
            axis.plot(values, color=colour, linewidth=1.8, label=label)
            axis.plot(layer, values[layer], "o", color=colour)
        axis.set(title=title, xlabel="layers run (the dot is the aligned layer)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("variance that is meaning (%)")
    axes[1].legend(frameon=False)
    return figure


def write(ablation: Mapping[str, Any], choices: Mapping[str, Any] | None) -> None:
    """The tables between the marks of docs/evidence.md, and its pictures; of choices where they have been measured."""
    page = PAGE.read_text(encoding="utf-8")
    for name, table in (tables(ablation) | (of_choices(choices) if choices else {})).items():
        begin, end = f"<!-- table: {name} -->\n", f"\n<!-- end: {name} -->"
        if begin not in page or end not in page:
            sys.exit(f"{PAGE}: no marks for the table {name!r}")
        page = page[: page.index(begin) + len(begin)] + table + page[page.index(end) :]
    PAGE.write_text(page, encoding="utf-8")
    align_then_diverge(ablation).savefig(IMAGES / "align_then_diverge.png", dpi=110)
    if choices:
        aligned_layers(choices).savefig(IMAGES / "aligned_layers.png", dpi=110)


def main(options: Options) -> None:
    if options.runs:
        file, found = RESULTS[options.to], collect(options)
        if file.is_file():
            found = added(found, _read(file))
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{file}: {sum(map(len, found['arms'].values()))} runs")
    write(*(_read(file) if file.is_file() else None for file in RESULTS.values()))


if __name__ == "__main__":
    main(tyro.cli(Options))

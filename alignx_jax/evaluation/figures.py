"""The pictures of an evaluation, from the dictionary that `evaluation.json` holds; each is a group of panels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from alignx_jax.data.languages import language_name
from alignx_jax.evaluation import panels, tables
from alignx_jax.evaluation.cells import INDEX, SCORE, SHARE, Number, Style, get, mean_curve, value_of
from alignx_jax.evaluation.panels import Group, Key, Line, Panel

_MODELS = ("#7d838c", "#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b")
"""The baseline is grey. Mostly the palette of Okabe and Ito (2008), which colour-blind readers can tell apart."""
_LANGUAGES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#117733", "#332288")
_POINTS = 120  # most points of a training curve; each is the mean of the steps around it


@dataclasses.dataclass(frozen=True)
class _Measure:
    """Something measured at every layer."""

    key: str
    title: str
    style: Style
    of: Callable[[dict], np.ndarray | None]
    """[L+1] of a model, mean over languages and directions; None where it was not measured."""


def _measure(key: str, title: str, style: Style, *path: str) -> _Measure:
    return _Measure(key, title, style, lambda model: mean_curve(get(model, "alignment", *path)))


def _contrast(model: dict) -> np.ndarray:
    same, other = (mean_curve(model["alignment"][f"{kind}_cosine"]) for kind in ("positive", "negative"))
    return same - other


_RETRIEVAL = _measure("retrieval", "Retrieval, mean of languages", SHARE, "retrieval")
_PROBE = _measure("probe", "Language probe, accuracy", SHARE, "language_probe")
_VARIANCE = (
    _measure("meaning-variance", "Variance that is meaning", SHARE, "meaning_variance"),
    _measure("language-variance", "Variance that is language", SHARE, "language_variance"),
)
_MEASURES = {
    "Do translations find each other?": (
        _measure("mexa-weighted", "MEXA, weighted mean", SHARE, "mexa", "weighted"),
        _measure("mexa-last", "MEXA, last token", SHARE, "mexa", "last"),
        _measure("xsim", "xSIM error (less is better)", SHARE, "xsim"),
        _measure("dali", "DALI", SHARE, "dali"),
        _measure("dali-strict", "DALI, strict", SHARE, "dali_strict"),
        _measure("in-prompt", "Retrieval inside the prompt (inflated)", SHARE, "in_prompt"),
    ),
    "How alike are the vectors?": (
        _measure("cosine-positive", "Cosine of translations", INDEX, "positive_cosine"),
        _measure("cosine-negative", "Cosine of other pairs", INDEX, "negative_cosine"),
        _Measure("cosine-difference", "Difference of the two", INDEX, _contrast),
        _measure("cka", "CKA", INDEX, "cka"),
        _measure("cka-debiased", "CKA, debiased", INDEX, "cka_debiased"),
    ),
    "Has the space collapsed?": (
        _measure("total-variance", "Total variance", INDEX, "total_variance"),
        _measure("cosine-random", "Cosine of random pairs", INDEX, "random_cosine"),
        _measure("uniformity", "Uniformity (less is more even)", INDEX, "uniformity"),
    ),
}


def curves(model: dict) -> dict[str, np.ndarray]:
    """Every per-layer measure of a model, [L+1] each, by the keys of its panels."""
    every = [_RETRIEVAL, _PROBE, *(measure for group in _MEASURES.values() for measure in group)]
    found = {measure.key: measure.of(model) for measure in every}
    return {key: curve for key, curve in found.items() if curve is not None}


def model_keys(results: dict) -> list[Key]:
    """One for each model, in order."""
    names = [model["name"] for model in results["models"]]
    others = iter(_MODELS[1:] * len(names))
    return [Key(name, _MODELS[0] if name == results["baseline"] else next(others)) for name in names]


def language_keys(results: dict) -> dict[str, Key]:
    """By code, the pivot first and dark; the others have nine colours in three shapes."""
    pivot, shapes = results["sentences"]["pivot"], tuple(panels.SHAPES)
    others = [code for code in results["sentences"]["languages"] if code != pivot]
    return {pivot: Key(pivot, panels.INK)} | {
        code: Key(code, _LANGUAGES[n % len(_LANGUAGES)], shapes[n // len(_LANGUAGES) % len(shapes)])
        for n, code in enumerate(others)
    }


def depth(results: dict) -> Group:
    """Align, then diverge: retrieval, the language probe, and what varies, over the layers."""
    sentences = results["sentences"]
    chances = 1 / sentences["count"], 1 / len(sentences["languages"])
    found = [
        _curve_panel(results, measure, named=True, note=f"chance: {SHARE.text(chance)}", size=(400, 260), floor=floor)
        for measure, chance, floor in zip((_RETRIEVAL, _PROBE), chances, (0.0, None), strict=True)
    ]
    found += [_curve_panel(results, measure, named=True, size=(400, 260), floor=0.0) for measure in _VARIANCE]
    return Group("depth", "Align, then diverge", _there(found), tuple(model_keys(results)))


def measures(results: dict) -> list[Group]:
    """Every other measure over the layers."""
    groups = [
        Group(f"measures-{n}", title, _there(_curve_panel(results, m) for m in found), tuple(model_keys(results)))
        for n, (title, found) in enumerate(_MEASURES.items(), 1)
    ]
    return [group for group in groups if group.panels]


def by_language(results: dict) -> Group:
    """Retrieval at the aligned layer, and its change; the first model's best language on top."""
    first = results["models"][0]
    codes = sorted(first["alignment"]["retrieval"], key=lambda code: -value_of(tables.retrieval(first, code)))

    def change(model, code):
        return get(model, "intervals", "retrieval_change", code)

    found = (
        _dot_panel(results, "by-language", "Retrieval at the aligned layer", SHARE, codes, tables.retrieval),
        _dot_panel(
            results, "by-language-change", "Change against the baseline, points", SHARE, codes, change, changes=True
        ),
    )
    return Group("by-language", "Retrieval by language", _there(found), tuple(model_keys(results)))


def matrices(results: dict) -> Group:
    """Retrieval from every language to every other at the aligned layer: a panel for each model, one scale for all."""
    codes = results["sentences"]["languages"]
    own = np.eye(len(codes), dtype=bool)
    shares = [np.where(own, np.nan, np.asarray(m["alignment"]["retrieval_matrix"], float)) for m in results["models"]]
    top = max(np.nanmax(found) for found in shares)
    group = []
    for place, (model, found) in enumerate(zip(results["models"], shares, strict=True)):
        ends = []
        for name, pick in (("highest", np.nanargmax), ("lowest", np.nanargmin)):
            row, column = np.unravel_index(pick(found), found.shape)
            way = f"from {language_name(codes[row])} to {language_name(codes[column])}"
            ends.append(f"{name} {SHARE.text(found[row, column])} {way}")
        mean = SHARE.text(np.nanmean(found))
        alt = f"Retrieval between {len(codes)} languages, {model['name']}: mean {mean}, {', '.join(ends)}."
        group.append(
            Panel(
                f"matrix-{place}",
                model["name"],
                alt,
                lambda axes, found=found: panels.draw_matrix(axes, found, codes, top),
                f"layer {model['align_layer']}, mean {mean}, scale 0 to {SHARE.text(top)}",
                (340, 325),
            )
        )
    return Group("matrix", "Every language with every other", tuple(group))


def projections(results: dict) -> list[Group]:
    """Sentences in the plane, a group for each model: embeddings, aligned layer, last layer."""
    keys, pivot = language_keys(results), results["sentences"]["pivot"]
    groups = []
    for place, model in enumerate(results["models"]):
        found = []
        for layer in sorted(model.get("projection") or (), key=int):
            plane = model["projection"][layer]
            points = {keys[code]: np.asarray(x, float) for code, x in plane["x"].items()}
            names = {0: "embeddings", model["align_layer"]: "aligned layer", model["layers"]: "last layer"}
            ratio = f"{_closeness(points, keys[pivot]):.2f}"
            share = [SHARE.text(part) for part in plane["explained"]]
            found.append(
                Panel(
                    f"plane-{place}-{layer}",
                    f"{layer}, {names[int(layer)]}",
                    f"Sentence vectors of {model['name']} after {layer} layers on their first two principal components "
                    f"({share[0]} and {share[1]} of the variance). Translations lie {ratio} times as far apart as "
                    "sentences of two languages that mean something else.",
                    lambda axes, points=points, share=share: panels.draw_plane(axes, points, keys[pivot], share),
                    f"translations lie {ratio} × as far apart as other pairs",
                    (330, 320),
                )
            )
        if found:
            groups.append(Group(f"plane-{place}", model["name"], tuple(found), tuple(keys.values())))
    return groups


def losses(results: dict) -> Group | None:
    """Training and validation curves of each loss."""
    names = {"next_token": "Next token", "contrastive": "Contrastive", "language_matching": "Language matching"}
    found = _there(_loss_panel(results, loss, title) for loss, title in names.items())
    keys = zip(model_keys(results), results["models"], strict=True)
    return Group("losses", "Losses", found, tuple(key for key, m in keys if m.get("training"))) if found else None


def translations(results: dict) -> Group | None:
    """chrF++ of every language, out of the pivot and into it."""
    pivot = results["sentences"]["pivot"]
    found = []
    for way, pattern in (("from", f"{pivot}-{{}}"), ("to", f"{{}}-{pivot}")):

        def number(model, code, pattern=pattern):
            scores = get(model, "translation", "directions", pattern.format(code)) or {}
            return scores.get("chrF++_interval", scores.get("chrF++"))

        title = f"chrF++ {way} {language_name(pivot)}"
        codes = [code for code in results["sentences"]["languages"] if code != pivot]
        found.append(_dot_panel(results, f"translation-{way}", title, SCORE, codes, number))
    found = _there(found)
    return Group("translation", "Translation by language", found, tuple(model_keys(results))) if found else None


def _there(found: Iterable[Panel | None]) -> tuple[Panel, ...]:
    return tuple(panel for panel in found if panel)


def _curve_panel(results: dict, measure: _Measure, note="", size=(330, 230), **options) -> Panel | None:
    """`options` are those of `draw_curves`. Models of different depths share a scale from 0 to 100%."""
    found = [(m, key, measure.of(m)) for m, key in zip(results["models"], model_keys(results), strict=True)]
    found = [(m, key, y) for m, key, y in found if y is not None]
    if not found:
        return None
    unequal = len({m["layers"] for m in results["models"]}) > 1
    lines = [Line(key, np.arange(len(y)) * (100 / m["layers"] if unequal else 1), np.asarray(y)) for m, key, y in found]
    aligned = sorted({float(line.x[m["align_layer"]]) for line, (m, _, _) in zip(lines, found, strict=True)})
    text = measure.style.text
    facts = "; ".join(
        f"{m['name']} {text(y[0])} at the embeddings, {text(y[m['align_layer']])} at the aligned layer "
        f"{m['align_layer']}, {text(y[-1])} at the last layer {m['layers']}, highest {text(y.max())} at {y.argmax()}"
        for m, _, y in found
    )
    label = "depth in %" if unequal else f"layer (0: embeddings, {found[0][0]['layers']}: last)"
    return Panel(
        measure.key,
        measure.title,
        f"{measure.title}, over depth: {facts}.",
        lambda axes: panels.draw_curves(axes, lines, measure.style, label, aligned=aligned, **options),
        note,
        size,
    )


def _dot_panel(
    results: dict,
    key: str,
    title: str,
    style: Style,
    codes: list[str],
    number: Callable[[dict, str], Number],
    changes: bool = False,
) -> Panel | None:
    """A row for each language that some model has."""
    found = {k: [number(m, c) for c in codes] for m, k in zip(results["models"], model_keys(results), strict=True)}
    found = {k: numbers for k, numbers in found.items() if any(n is not None for n in numbers)}
    if not found:
        return None
    there = [n for n in range(len(codes)) if any(numbers[n] is not None for numbers in found.values())]
    names = [codes[n] for n in there]
    found = {k: [numbers[n] for n in there] for k, numbers in found.items()}
    write = style.signed if changes else style.text
    facts = "; ".join(
        f"{k.text} "
        + ", ".join(f"{c} {write(value_of(n))}" for c, n in zip(names, numbers, strict=True) if n is not None)
        for k, numbers in found.items()
    )
    height = 50 + len(names) * max(18, 8 * len(results["models"]))
    return Panel(
        key,
        title,
        f"{title}: {facts}.",
        lambda axes: panels.draw_dots(axes, names, found, style, changes),
        size=(400, height),
    )


def _loss_panel(results: dict, loss: str, title: str) -> Panel | None:
    """Validation in full, training (means of neighbouring steps) behind it."""
    lines, facts = [], []
    for model, key in zip(results["models"], model_keys(results), strict=True):
        for kind in ("train", "validation"):
            records = [r for r in (model.get("training") or {}).get(kind, ()) if loss in r]
            if not records:
                continue
            xy = np.array([[r["step"], r[loss]] for r in records], float)
            if kind == "validation":
                first, last = (f"{y:.3f}" if np.isfinite(y) else "not finite" for y in (xy[0, 1], xy[-1, 1]))
                facts.append(f"{key.text} from {first} to {last} at step {xy[-1, 0]:.0f}")
            else:
                xy = np.stack([part.mean(axis=0) for part in np.array_split(xy, min(_POINTS, len(xy)))])
            lines.append(Line(key, xy[:, 0], xy[:, 1], faint=kind == "train"))
    if not lines:
        return None
    alt = f"{title} loss over training steps" + (f"; validation: {'; '.join(facts)}." if facts else ".")
    return Panel(
        f"loss-{loss.replace('_', '-')}", title, alt, lambda axes: panels.draw_curves(axes, lines, INDEX, "step")
    )


def _closeness(points: dict[Key, np.ndarray], pivot: Key) -> float:
    """Mean distance of translations over that of other pairs, between the pivot and every other language."""
    same, other = [], []
    for key, x_Nx2 in points.items():
        if key is not pivot:
            distance_NxN = np.linalg.norm(points[pivot][:, None] - x_Nx2[None], axis=-1)
            own = np.eye(len(distance_NxN), dtype=bool)
            same.append(distance_NxN[own].mean())
            other.append(distance_NxN[~own].mean())
    return float(np.mean(same) / np.mean(other))

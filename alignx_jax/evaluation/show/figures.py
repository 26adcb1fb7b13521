"""The pictures of an evaluation; each is a group of panels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from alignx_jax.data.languages import language_name
from alignx_jax.evaluation.rows import SCORED, Model, Results, Row
from alignx_jax.evaluation.show import panels
from alignx_jax.evaluation.show.cells import INDEX, SCORE, SHARE, Style
from alignx_jax.evaluation.show.panels import Group, Key, Line, Panel

_MODELS = ("#7d838c", "#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b")
"""The baseline is grey. Mostly the palette of Okabe and Ito (2008), which colour-blind readers can tell apart."""
_LANGUAGES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#117733", "#332288")
_POINTS = 120  # most points of a training curve; each is the mean of the steps around it


_RETRIEVAL = ("retrieval", "Retrieval, mean of languages", SHARE)
_PROBE = ("language_probe", "Language probe, accuracy", SHARE)
_VARIANCE = (
    ("meaning_variance", "Variance that is meaning", SHARE),
    ("language_variance", "Variance that is language", SHARE),
)
_MEASURES = {
    "Do translations find each other?": (
        ("mexa", "MEXA, weighted mean", SHARE),
        ("mexa_last", "MEXA, last token", SHARE),
        ("xsim", "xSIM error (less is better)", SHARE),
        ("dali", "DALI", SHARE),
        ("dali_strict", "DALI, strict", SHARE),
        ("in_prompt", "Retrieval inside the prompt (inflated)", SHARE),
    ),
    "How alike are the vectors?": (
        ("positive_cosine", "Cosine of translations", INDEX),
        ("negative_cosine", "Cosine of other pairs", INDEX),
        ("cosine_difference", "Difference of the two", INDEX),
        ("cka", "CKA", INDEX),
        ("cka_debiased", "CKA, debiased", INDEX),
    ),
    "Has the space collapsed?": (
        ("total_variance", "Total variance", INDEX),
        ("random_cosine", "Cosine of random pairs", INDEX),
        ("uniformity", "Uniformity (less is more even)", INDEX),
    ),
}
"""What is measured at every layer: its name, title and style."""


def curves(results: Results, model: Model) -> dict[str, np.ndarray]:
    """Every curve of a model that is drawn, [L+1] each, by its measure."""
    every = [_RETRIEVAL, _PROBE, *_VARIANCE, *(measure for group in _MEASURES.values() for measure in group)]
    found = {measure: results.curve(model, measure) for measure, *_ in every}
    return {measure: curve for measure, curve in found.items() if curve is not None}


def model_keys(results: Results) -> list[Key]:
    """One for each model, in order."""
    others = iter(_MODELS[1:] * len(results.models))
    return [Key(m.name, _MODELS[0] if m.name == results.baseline else next(others)) for m in results.models]


def language_keys(results: Results) -> dict[str, Key]:
    """By code, the pivot first and dark; the others have nine colours in three shapes."""
    pivot, shapes = results.sentences.pivot, tuple(panels.SHAPES)
    others = [code for code in results.sentences.languages if code != pivot]
    return {pivot: Key(pivot, panels.INK)} | {
        code: Key(code, _LANGUAGES[n % len(_LANGUAGES)], shapes[n // len(_LANGUAGES) % len(shapes)])
        for n, code in enumerate(others)
    }


def depth(results: Results) -> Group:
    """Align, then diverge: retrieval, the language probe, and what varies, over the layers."""
    chances = 1 / results.sentences.count, 1 / len(results.sentences.languages)
    found = [
        _curve_panel(results, *measure, named=True, note=f"chance: {SHARE.text(chance)}", size=(400, 260), floor=floor)
        for measure, chance, floor in zip((_RETRIEVAL, _PROBE), chances, (0.0, None), strict=True)
    ]
    found += [_curve_panel(results, *measure, named=True, size=(400, 260), floor=0.0) for measure in _VARIANCE]
    return Group("depth", "Align, then diverge", _there(found), tuple(model_keys(results)))


def measures(results: Results) -> list[Group]:
    """Every other measure over the layers."""
    groups = [
        Group(f"measures-{n}", title, _there(_curve_panel(results, *m) for m in found), tuple(model_keys(results)))
        for n, (title, found) in enumerate(_MEASURES.items(), 1)
    ]
    return [group for group in groups if group.panels]


def by_language(results: Results) -> Group:
    """Retrieval at the aligned layer, and its change; the first model's best language on top."""
    values, changes = {}, {}
    for model in results.models:
        values[model.name], changes[model.name] = (
            {
                code: row
                for code in results.sentences.languages
                if (row := results.find(model, "retrieval", "aligned", language=code, against=other))
            }
            for other in (None, results.base)
        )
    first = values[results.models[0].name]
    codes = sorted(results.sentences.languages, key=lambda code: -first[code].value if code in first else 0)
    changes = changes if results.base else {}
    found = (
        _dot_panel(results, "by-language", "Retrieval at the aligned layer", SHARE, codes, values),
        _dot_panel(
            results, "by-language-change", "Change against the baseline, points", SHARE, codes, changes, changes=True
        ),
    )
    return Group("by-language", "Retrieval by language", _there(found), tuple(model_keys(results)))


def matrices(results: Results) -> Group:
    """Retrieval from every language to every other at the aligned layer: a panel for each model, one scale for all."""
    codes = results.sentences.languages
    shares = [(model, _matrix(results, model)) for model in results.models]
    shares = [(model, shares_KxK) for model, shares_KxK in shares if not np.all(np.isnan(shares_KxK))]
    top = max((np.nanmax(shares_KxK) for _, shares_KxK in shares), default=0)
    group = []
    for place, (model, found) in enumerate(shares):
        ends = []
        for name, pick in (("highest", np.nanargmax), ("lowest", np.nanargmin)):
            row, column = np.unravel_index(pick(found), found.shape)
            way = f"from {language_name(codes[row])} to {language_name(codes[column])}"
            ends.append(f"{name} {SHARE.text(found[row, column])} {way}")
        mean = SHARE.text(np.nanmean(found))
        alt = f"Retrieval between {len(codes)} languages, {model.name}: mean {mean}, {', '.join(ends)}."
        group.append(
            Panel(
                f"matrix-{place}",
                model.name,
                alt,
                lambda axes, found=found: panels.draw_matrix(axes, found, codes, top),
                f"layer {model.align_layer}, mean {mean}, scale 0 to {SHARE.text(top)}",
                (340, 325),
            )
        )
    return Group("matrix", "Every language with every other", tuple(group))


def _matrix(results: Results, model: Model) -> np.ndarray:
    """[K,K] retrieval from each language to each other at the aligned layer; NaN where there is none."""
    codes = results.sentences.languages
    rows = [[results.find(model, "retrieval", "aligned", direction=f"{a}-{b}") for b in codes] for a in codes]
    return np.array([[np.nan if row is None else row.value for row in of] for of in rows])


def projections(results: Results) -> list[Group]:
    """Sentences in the plane, a group for each model: embeddings, aligned layer, last layer."""
    keys, pivot = language_keys(results), results.sentences.pivot
    groups = []
    for place, model in enumerate(results.models):
        found = []
        for plane in sorted(model.projection, key=lambda plane: plane.layer):
            points = {keys[code]: np.asarray(x, float) for code, x in plane.x.items()}
            names = {0: "embeddings", model.align_layer: "aligned layer", model.layers: "last layer"}
            ratio = f"{_closeness(points, keys[pivot]):.2f}"
            share = [SHARE.text(part) for part in plane.explained]
            found.append(
                Panel(
                    f"plane-{place}-{plane.layer}",
                    f"{plane.layer}, {names[plane.layer]}",
                    f"Sentence vectors of {model.name} after {plane.layer} layers on their first two principal "
                    f"components ({share[0]} and {share[1]} of the variance). Translations lie {ratio} times as far "
                    "apart as sentences of two languages that mean something else.",
                    lambda axes, points=points, share=share: panels.draw_plane(axes, points, keys[pivot], share),
                    f"translations lie {ratio} × as far apart as other pairs",
                    (330, 320),
                )
            )
        if found:
            groups.append(Group(f"plane-{place}", model.name, tuple(found), tuple(keys.values())))
    return groups


def losses(results: Results) -> Group | None:
    """Training and validation curves of each loss."""
    names = {"next_token": "Next token", "contrastive": "Contrastive", "language_matching": "Language matching"}
    found = _there(_loss_panel(results, loss, title) for loss, title in names.items())
    keys = zip(model_keys(results), results.models, strict=True)
    return Group("losses", "Losses", found, tuple(key for key, m in keys if m.training)) if found else None


def translations(results: Results) -> Group | None:
    """chrF++ of every language, out of the pivot and into it."""
    pivot = results.sentences.pivot
    codes = [code for code in results.sentences.languages if code != pivot]
    found = []
    for way, pattern in (("from", f"{pivot}-{{}}"), ("to", f"{{}}-{pivot}")):
        values = {
            model.name: {
                code: row for code in codes if (row := results.find(model, SCORED, direction=pattern.format(code)))
            }
            for model in results.models
        }
        title = f"{SCORED} {way} {language_name(pivot)}"
        found.append(_dot_panel(results, f"translation-{way}", title, SCORE, codes, values))
    found = _there(found)
    return Group("translation", "Translation by language", found, tuple(model_keys(results))) if found else None


def _there(found: Iterable[Panel | None]) -> tuple[Panel, ...]:
    return tuple(panel for panel in found if panel)


def _curve_panel(
    results: Results, measure: str, title: str, style: Style, note: str = "", size=(330, 230), **options
) -> Panel | None:
    """`options` are those of `draw_curves`. Models of different depths share a scale from 0 to 100%."""
    found = [(m, key, results.curve(m, measure)) for m, key in zip(results.models, model_keys(results), strict=True)]
    found = [(m, key, y) for m, key, y in found if y is not None]
    if not found:
        return None
    unequal = len({m.layers for m in results.models}) > 1
    lines = [Line(key, np.arange(len(y)) * (100 / m.layers if unequal else 1), y) for m, key, y in found]
    aligned = sorted({float(line.x[m.align_layer]) for line, (m, _, _) in zip(lines, found, strict=True)})
    facts = "; ".join(
        f"{m.name} {style.text(y[0])} at the embeddings, {style.text(y[m.align_layer])} at the aligned layer "
        f"{m.align_layer}, {style.text(y[-1])} at the last layer {m.layers}, highest {style.text(y.max())} at "
        f"{y.argmax()}"
        for m, _, y in found
    )
    label = "depth in %" if unequal else f"layer (0: embeddings, {found[0][0].layers}: last)"
    return Panel(
        measure.replace("_", "-"),
        title,
        f"{title}, over depth: {facts}.",
        lambda axes: panels.draw_curves(axes, lines, style, label, aligned=aligned, **options),
        note,
        size,
    )


def _dot_panel(
    results: Results,
    key: str,
    title: str,
    style: Style,
    codes: list[str],
    rows: dict[str, dict[str, Row]],
    changes: bool = False,
) -> Panel | None:
    """A row for each language that some model has; `rows` by model and language."""
    found = {key: rows[key.text] for key in model_keys(results) if rows.get(key.text)}
    if not found:
        return None
    names = [code for code in codes if any(code in of for of in found.values())]
    write = style.signed if changes else style.text
    facts = "; ".join(
        f"{key.text} " + ", ".join(f"{code} {write(of[code].value)}" for code in names if code in of)
        for key, of in found.items()
    )
    height = 50 + len(names) * max(18, 8 * len(results.models))
    return Panel(
        key,
        title,
        f"{title}: {facts}.",
        lambda axes: panels.draw_dots(axes, names, found, style, changes),
        size=(400, height),
    )


def _loss_panel(results: Results, loss: str, title: str) -> Panel | None:
    """Validation in full, training (means of neighbouring steps) behind it."""
    lines, facts = [], []
    for model, key in zip(results.models, model_keys(results), strict=True):
        for kind in ("train", "validation"):
            records = getattr(model.training, kind, ())
            xy = np.array([[r.step, getattr(r, loss)] for r in records], float)  # None is NaN
            if not len(xy) or np.all(np.isnan(xy[:, 1])):
                continue
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

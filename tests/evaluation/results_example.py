"""An example of an evaluation's results. Every number in it is invented; the shapes and the keys are the real ones."""

import numpy as np

CODES = ["ar", "de", "en", "es", "fr", "hi", "ru", "sw", "vi", "zh", "bg", "cs", "el", "et"]
CODES += ["fi", "he", "id", "it", "ja", "ko", "nl", "pl", "pt", "ro", "ta", "th", "tr"]
NAMES = ["base model", "stage 1", "next-token only", "stage 2", "other seed", "larger"]
_STRENGTH = [0.0, 0.38, 0.07, 0.27, 0.36, 0.45]  # how much closer the invented models are than the first
_SAMPLES = [
    ("de-en", "Letzte Woche hat meine Freundin den Hof gefegt.", "Last week my friend swept the yard."),
    ("en-ar", "Last week my friend swept the yard.", "كنست صديقتي الفناء الأسبوع الماضي."),
    ("en-zh", "Yesterday the cook wrote the letter.", "昨天厨师写好了那封信。"),
]


def build(models: int = 4, languages: int = 10, layers: int = 16, seed: int = 0) -> dict:
    """Results of `models` models with every part filled; equal arguments give equal results."""
    rng = np.random.default_rng(seed)
    codes = CODES[:languages] if "en" in CODES[:languages] else ["en", *CODES[: languages - 1]]
    every = [_model(rng, m, codes, layers) for m in range(models)]
    for m, model in enumerate(every):
        _compare(rng, every[0], model, changed=m > 0)
    return {
        "format": 1,
        "command": "python run.py --stage=evaluate --run=runs/example --mesh=8x1",
        "date": "2026-11-23",
        "machine": "8 x cpu (simulated), mesh data 8 x model 1",
        "versions": {"alignx_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "sacrebleu": "2.6.0"},
        "config": {
            "mesh": "8x1",
            "evaluation": {"sentences": "example", "pivot": "en", "limit": 1000, "translation": {"method": "greedy"}},
            "seed": 0,
        },
        "sentences": {
            "file": "EXAMPLE: every number is invented",
            "count": 546,
            "languages": codes,
            "pivot": "en",
            "sha256": "0" * 64,
        },
        "notes": ["stage 2 was trained with another template."],
        "baseline": every[0]["name"],
        "models": every,
        "against_control": [_against(rng, every[1], every[2])] if models > 2 else [],
    }


def _model(rng, m: int, codes: list[str], layers: int) -> dict:
    others = [code for code in codes if code != "en"]
    align, depth = layers // 2, np.linspace(0, 1, layers + 1)
    ease = dict(zip(others, np.linspace(1.15, 0.35, len(others)), strict=True))
    gain = _STRENGTH[m]
    hump = np.exp(-(((depth - 0.5) / 0.28) ** 2))

    def series(low, high, code=None, noise=0.012, limit=(0, 1)):
        curve = low + (high - low) * hump * (ease[code] if code else 1)
        return [float(v) for v in np.clip(curve + rng.normal(0, noise, layers + 1), *limit)]

    def by_code(low, high, noise=0.012, limit=(0, 1)):
        return {code: series(low, high, code, noise, limit) for code in others}

    def both(low, high, noise=0.012):
        return {c: {way: series(low, high, c, noise) for way in ("to_pivot", "from_pivot")} for c in others}

    dip = 0.22 * hump * (1 + gain) - 0.03 * (depth > 0.8) * (m > 0)
    retrieval = both(0.04, 0.34 + gain)
    level = {code: np.mean([retrieval[code][way][align] for way in retrieval[code]]) for code in others} | {"en": 0.8}
    matrix = [[1.0 if a == b else float(np.sqrt(level[a] * level[b]) * 0.9) for b in codes] for a in codes]
    spread = np.exp(0.4 * depth + 2.2 * depth**4)
    return {
        "name": NAMES[m],
        "path": f"runs/example/{NAMES[m].replace(' ', '')}",
        "family": "llama",
        "parameters": 14_487_808,
        "layers": layers,
        "step": 400 if m else None,
        "weights": "0af0",
        "align_layer": align,
        "baseline_layer": align,
        "unknown_rate": {code: 0.0132 if code == "hi" else 0.0 for code in codes},
        "tokens_per_sentence": {code: float(12 + 9 * rng.random()) if m == 0 else 15.0 for code in codes},
        "layers_measured": layers + 1,
        "alignment": {
            "retrieval": retrieval,
            "retrieval_matrix": matrix,
            "xsim": both(0.93, 0.62 - gain),
            "mexa": {"weighted": by_code(0.02, 0.28 + gain), "last": by_code(0.01, 0.18 + gain)},
            "mexa_sentences": 100,
            "positive_cosine": by_code(0.45, 0.72 + gain / 3),
            "negative_cosine": by_code(0.42, 0.55 - gain / 4),
            "cka": by_code(0.3, 0.62 + gain / 2),
            "cka_debiased": by_code(0.2, 0.54 + gain / 2),
            "total_variance": [float(v) for v in spread * (1 + gain)],
            "random_cosine": series(0.4, 0.58 - gain / 3),
            "uniformity": [float(v) for v in -2.4 + hump * (0.5 - gain) + rng.normal(0, 0.02, layers + 1)],
            "language_probe": [float(v) for v in np.clip(0.995 - dip + rng.normal(0, 0.003, layers + 1), 0, 1)],
            "language_variance": [float(v) for v in 0.3 - 0.2 * hump * (1 + gain) + 0.4 * (depth > 0.8)],
            "meaning_variance": [float(v) for v in 0.2 + 0.4 * hump * (1 + gain)],
            "dali": by_code(0.48, 0.55 + gain / 2) if m % 2 == 0 else None,
            "dali_strict": by_code(0.11, 0.15 + gain / 2) if m % 2 == 0 else None,
            "matching_head": {"accuracy": 0.941, "balanced": 0.93, "same": 0.902, "different": 0.958}
            if m == 1
            else None,
            "in_prompt": both(0.3, 0.8 + gain / 3) if m < 2 else None,
        },
        "perplexity": _perplexity(rng, codes, m),
        "continuation_choice": {code: _interval(0.66 + gain / 4 - 0.01 * i) for i, code in enumerate(codes)},
        "choices": {code: _interval(0.54 + gain / 8, 0.045) for code in codes[:4]},
        "translation": _translation(rng, codes, gain, first=m == 0),
        "tasks": {
            "arc_easy": {"acc,none": [0.412 - 0.004 * m, 0.0101, True], "acc_norm,none": [0.388, 0.0099, True]},
            "xcopa": {"acc,none": [0.54 + gain / 9, 0.0158, True]},
            "xcopa_sw": {"acc,none": [0.549 + gain / 9, 0.0223, True]},
            "xcopa_zh": {"acc,none": [0.531 + gain / 9, 0.0223, True]},
            "wikitext": {"word_perplexity,none": [31.2 + 0.4 * m, 0.31, False]},
        },
        "task_requests": {"max_length": 2048, "cut": {"arc_easy": [0, 9501], "xcopa_zh": [3, 1000]}},
        "task_groups": {"xcopa": ["xcopa_sw", "xcopa_zh"]},
        "projection": {str(layer): _projection(rng, codes, layer / layers, gain) for layer in (0, align, layers)},
        "training": _training(rng, m) if m else None,
    }


def _compare(rng, base: dict, model: dict, changed: bool) -> None:
    model["intervals"] = _values(model)
    if changed:
        before = _values(base)
        for name, of in _values(model).items():
            model["intervals"][f"{name}_change"] = {c: _interval(v[0] - before[name][c][0]) for c, v in of.items()}
        for name in ("bits_per_byte", "perplexity"):
            model["intervals"].setdefault(f"{name}_change", {})
        for code, value in model["perplexity"].items():
            old = base["perplexity"][code]
            bits = _interval(value["bits_per_byte"][0] - old["bits_per_byte"][0], 0.006)
            model["intervals"]["bits_per_byte_change"][code] = bits
            model["intervals"]["perplexity_change"][code] = _interval(value["value"] - old["value"], 0.3)
    for scores, old in (
        (model["translation"]["directions"], base["translation"]["directions"]),
        (model["translation"]["averages"], base["translation"]["averages"]),
    ):
        for key, score in scores.items():
            change = _interval(score["chrF++"] - old[key]["chrF++"], 0.6 if len(key) < 5 else 1.4)
            score["chrF++_change"] = change if changed else None


def _against(rng, model: dict, control: dict) -> dict:
    """Of stage 1 and the run without the pair losses."""
    one = {name: of for name, of in model.items() if name not in ("intervals", "translation")}
    one["translation"] = {part: {k: {**v} for k, v in of.items()} for part, of in _scores_of(model).items()}
    _compare(rng, control, one, changed=True)
    changes = {name: of for name, of in one["intervals"].items() if name.endswith("_change")}
    translation = {
        part: {key: {"chrF++_change": scores["chrF++_change"]} for key, scores in of.items()}
        for part, of in one["translation"].items()
    }
    pair = {"model": model["name"], "control": control["name"], "baseline_layer": model["align_layer"]}
    return pair | {"intervals": changes, "translation": translation}


def _scores_of(model: dict) -> dict:
    return {part: model["translation"][part] for part in ("directions", "averages")}


def _values(model: dict) -> dict:
    """Of the measures of alignment at the aligned layer by language and their means, of text the means of others."""
    alignment, layer = model["alignment"], model["align_layer"]

    def with_mean(values, half=0.034):
        found = {code: _interval(value, half) for code, value in values.items()}
        return found | {"mean": _interval(np.mean(list(values.values())), 0.011)}

    def both(name):
        ways = ("to_pivot", "from_pivot")
        return {code: np.mean([of[way][layer] for way in ways]) for code, of in alignment[name].items()}

    bits = [p["bits_per_byte"][0] for code, p in model["perplexity"].items() if code != "en"]
    probe = {place: alignment["language_probe"][n] for place, n in (("", layer), ("_last", -1))}
    others = {
        name: [value[0] for code, value in model[name].items() if code != "en"]
        for name in ("continuation_choice", "choices")
    }
    dali = {name: {code: of[layer] for code, of in (alignment[name] or {}).items()} for name in ("dali", "dali_strict")}
    return {
        "retrieval": with_mean(both("retrieval")),
        "xsim": with_mean(both("xsim")),
        "mexa": with_mean({code: of[layer] for code, of in alignment["mexa"]["weighted"].items()}),
        **{name: with_mean(values) for name, values in dali.items() if values},
        **{f"language_probe{place}": {"mean": _interval(value, 0.004)} for place, value in probe.items()},
        "bits_per_byte": {"others": _interval(np.mean(bits), 0.009)},
        **{name: {"others": _interval(np.mean(values), 0.01)} for name, values in others.items()},
    }


def _interval(value: float, half: float = 0.02) -> list[float]:
    return [float(value), float(value - half), float(value + half * 1.1)]


def _perplexity(rng, codes: list[str], m: int) -> dict:
    found = {}
    for i, code in enumerate(codes):
        bits = 0.92 + 0.05 * i + (0.008 * m if code == "en" else -0.03 * m) + rng.normal(0, 0.002)
        found[code] = {"value": float(np.exp(bits * 3.1)), "bits_per_byte": _interval(bits, 0.012)}
    return found


def _translation(rng, codes: list[str], gain: float, first: bool) -> dict:
    def scores(value):
        chrf = float(value)
        return {
            "BLEU": chrf * 0.45,
            "chrF++": chrf,
            "spBLEU (flores200)": chrf * 0.52,
            "off_target": float(0.31 - 0.5 * gain),
            "copy": float(0.06 - 0.1 * gain),
            "empty": 0.004,
            "cut": 0.02,
            "chrF++_interval": _interval(chrf, 1.3),
            "chrF++_floor": 9.5,
            "chrF++_above_floor": _interval(chrf - 9.5, 1.1),
            "distinct": 0.96,
            "repeating": [0, 1],
        }

    directions = {}
    for i, code in enumerate(c for c in codes if c != "en"):
        directions[f"en-{code}"] = scores(31 - i + 14 * gain + rng.normal(0, 0.4))
        directions[f"{code}-en"] = scores(38 - i + 11 * gain + rng.normal(0, 0.4))
    averages = {}
    for key, mine in (("en-x", lambda d: d.startswith("en-")), ("x-en", lambda d: d.endswith("-en"))):
        own = [s["chrF++"] for d, s in directions.items() if mine(d)]
        averages[key] = scores(np.mean(own)) | {"repeating": [0, len(own)]}
    if {"de", "fr"} <= set(codes):
        directions["de-fr"], averages["x-y"] = scores(22 + 9 * gain), scores(22 + 9 * gain)
    samples = [
        {
            "direction": direction,
            "source": source,
            "reference": reference,
            "output": ["", source, reference][0 if first and n == 2 else 1 if first else 2],
        }
        for n, (direction, source, reference) in enumerate(_SAMPLES)
    ]
    return {
        "directions": directions,
        "averages": averages,
        "signatures": {
            "BLEU": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
            "chrF++": "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0",
        },
        "notes": ["The language identifier knows no Swahili; its off-target rate is left out."],
        "samples": samples,
    }


def _projection(rng, codes: list[str], depth: float, gain: float, sentences: int = 30) -> dict:
    apart = 3.2 * (1 - np.exp(-(((depth - 0.5) / 0.25) ** 2)) * (0.35 + gain)) * (0.7 if depth == 0 else 1)
    meanings = rng.normal(0, 1.2 * (1.3 - apart / 4), (sentences, 2))
    points = {}
    for i, code in enumerate(codes):
        angle = 2 * np.pi * i / len(codes)
        centre = apart * np.array([np.cos(angle), np.sin(angle)])
        points[code] = [[float(x), float(y)] for x, y in meanings + centre + rng.normal(0, 0.22, (sentences, 2))]
    return {"x": points, "explained": [float(0.21 - 0.05 * depth), float(0.12 - 0.02 * depth)]}


def _training(rng, m: int) -> dict:
    start = {"next_token": (4.1, 2.2), "contrastive": (1.6, 0.5), "language_matching": (0.7, 0.12)}
    names = {1: list(start), 2: ["next_token"], 3: ["next_token"]}.get(m, list(start))

    def record(step, noise):
        values = {
            name: float((b + (a - b) * np.exp(-step / 90)) * (1 - 0.05 * m) + rng.normal(0, noise * a))
            for name, (a, b) in start.items()
        }
        values = {name: values[name] for name in names}
        return {"step": step, "loss": sum(values.values()), **values}

    return {
        "train": [record(step, 0.02) for step in range(1, 401)],
        "validation": [record(step, 0.003) for step in range(0, 401, 50)],
        "balance": [_balance(step, names) for step in (0, 400)] if len(names) > 1 else [],
    }


def _balance(step: int, names: list[str]) -> dict:
    cosines = {"cosine/translations": 0.31, "cosine/others": -0.02, "cosine/deviation": 0.11}
    values = {
        f"{kind}/{name}": scale * (n + 1 + step / 400)
        for kind, scale in (("chance", 2.0), ("gradient", 3.0), ("share", 0.1))
        for n, name in enumerate(names)
    }
    return {"step": step, **{name: 1.5 for name in names}, **values, **cosines}

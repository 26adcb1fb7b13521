"""Scores of translations: BLEU, spBLEU and chrF++ by sacrebleu, COMET, off-target and copied outputs; with intervals.

Every score of a direction is a function of sums over its sentences, so that it can be computed on any resample.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import sacrebleu
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS

from alignx_jax.config import TranslationConfig
from alignx_jax.data.identify import LEAST, is_improbable, label_of
from alignx_jax.data.languages import language_name
from alignx_jax.evaluation.measure import chance
from alignx_jax.evaluation.measure.scores import Place, Score, Sums, mean, of_sums
from alignx_jax.evaluation.measure.translation import COMET, Direction
from alignx_jax.evaluation.rows import ABOVE_FLOOR, FLOOR, SCORED, Sample, averages

_SPBLEU = ("flores101", "flores200")
_PATIENCE = 30  # seconds to download the tokenizer of one of them in
_TOKENIZERS = {
    "zh": ("zh",),
    "yue": ("zh",),
    "ja": ("ja-mecab", "char"),
    "ko": ("ko-mecab", "13a"),
    **dict.fromkeys(("th", "lo", "km", "my", "bo"), ("char",)),  # no spaces between words: 13a would find one
}
"""sacrebleu's tokenizers of BLEU by target language, the first that is installed; 13a for all others."""
_NOTED = 0.01  # share of references called off-target that is worth a note
_SAMPLES = 24


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU in %, [...], of sacrebleu's sums [...,10]: the tokens of output and reference, then of n-grams those that
    are in the reference and all, n from 1 to 4.

    Papineni et al. 2002; no n-gram found counts as one half, one fourth and so on (Chen and Cherry 2014, method 3).
    """
    length, reference, found, every = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:]
    precisions = np.where(found > 0, found, 0.5 ** np.cumsum(found == 0, axis=-1)) / np.maximum(every, 1)
    brevity = np.exp(np.minimum(0, 1 - reference / np.maximum(length, 1)))
    defined = np.all(every > 0, axis=-1) & np.any(found > 0, axis=-1)
    return np.where(defined, 100 * brevity * np.exp(np.mean(np.log(precisions), axis=-1)), 0.0)


def chrf(sums: np.ndarray) -> np.ndarray:
    """chrF in %, [...], of sacrebleu's sums [...,3 kinds]: for each kind of n-gram those of the output, of the
    reference and of both.

    Popovic 2017 with beta 2; precision and recall are means over the kinds that output and reference have. (sacrebleu
    counts none of an output where its reference has none.)
    """
    output, reference, both = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    counted = output > 0
    kinds = np.maximum(np.sum(counted, axis=-1), 1)
    precision = np.sum(np.where(counted, both / np.maximum(output, 1), 0), axis=-1) / kinds
    recall = np.sum(np.where(counted, both / np.maximum(reference, 1), 0), axis=-1) / kinds
    return 100 * 5 * precision * recall / np.where(precision + recall > 0, 4 * precision + recall, 1)


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first of two sums [...,2] over the second, [...]; NaN where that is 0: without any text there is no rate of
    it."""
    return sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], np.nan)


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of one model: BLEU, spBLEU and chrF++ in %, rates as shares of 1, COMET as its model gives it."""

    pivot: str
    measures: dict[Direction, dict[str, Sums]]
    """By direction and metric. What could not be measured is not there, and `notes` say why."""
    signatures: dict[str, str]
    """Of each metric, what it takes to get the same value again."""
    notes: list[str]
    outputs: dict[Direction, list[str]]
    sentences: dict[str, list[str]]
    floors: dict[Direction, Sums] = dataclasses.field(default_factory=dict)
    """chrF++ of the same outputs with references shuffled among the sentences; none of a sentence alone."""


def score(
    outputs: Mapping[Direction, Sequence[str]],
    sentences: Mapping[str, Sequence[str]],
    pivot: str,
    config: TranslationConfig,
    cut: Mapping[Direction, Sequence[bool]],
) -> Result:
    """Scores what `translation.translate` returned; references are the sentences of the target language.

    - BLEU with sacrebleu's tokenizer for the target language, which is in the signature; spBLEU with each of its two
      tokenizers, left out where that is neither on this machine nor to be downloaded; chrF++; COMET if asked for.
    - The floor: chrF++ against references shuffled among the sentences, the same way in every direction and model.
    - `empty`: share of outputs without text.
    - `cut`: share of outputs that were cut off at `max_tokens`.
    - `copy`: share of outputs that are their source. Compared are letters, marks and numbers, NFKC and casefolded.
    - `off_target`: share, of the outputs with text, of those to which py3langid gives a probability below 0.2 of being
      in the target language. It does not tell scripts of a language apart.
    """
    result = Result(pivot, {pair: {} for pair in outputs}, {}, [], {**outputs}, {**sentences})
    targets = dict.fromkeys(target for _, target in outputs)
    for target in targets:
        metric, name = _bleu_into(target, result.notes)
        _add(result, "BLEU", metric, [pair for pair in outputs if pair[1] == target], name)
    _add(result, SCORED, sacrebleu.CHRF(word_order=2), list(outputs), SCORED)
    _add_floors(result, sacrebleu.CHRF(word_order=2))
    for tokenizer in _SPBLEU:
        metric, name = _load(tokenizer), f"spBLEU ({tokenizer})"
        if isinstance(metric, str):
            url = SPM_MODELS[tokenizer]["url"]
            file = Path(sacrebleu.SACREBLEU_DIR, "models", Path(url).name)
            result.notes.append(f"No {name}: its tokenizer cannot be loaded ({metric}); put {url} at {file}.")
        else:
            _add(result, name, metric, list(outputs), name)
    if config.comet:
        _add_comet(result, config.comet)
    _add_rates(result, cut)
    result.notes.extend(_notes_on_identifier({code: sentences[code] for code in targets}))
    return result


def _add(
    result: Result,
    name: str,
    metric: sacrebleu.BLEU | sacrebleu.CHRF,
    pairs: Sequence[Direction],
    signature: str,
) -> None:
    """A metric of sacrebleu. Its statistics of sentences are not public; a test compares with `corpus_score`."""
    for pair in pairs:
        result.measures[pair][name] = _measure(metric, result.outputs[pair], result.sentences[pair[1]])
    result.signatures[signature] = str(metric.get_signature())


def _add_floors(result: Result, metric: sacrebleu.CHRF) -> None:
    for pair, lines in result.outputs.items():
        if len(lines) > 1:
            others = [result.sentences[pair[1]][n] for n in chance.derangement(len(lines))]
            result.floors[pair] = _measure(metric, lines, others)


def _measure(metric: sacrebleu.BLEU | sacrebleu.CHRF, outputs: Sequence[str], references: Sequence[str]) -> Sums:
    sums = metric._extract_corpus_statistics(outputs, [references])
    formula = chrf if isinstance(metric, sacrebleu.CHRF) else bleu
    return Sums(metric._aggregate_and_compute(sums).score, np.array(sums, np.float64), formula)


def _bleu_into(target: str, notes: list[str]) -> tuple[sacrebleu.BLEU, str]:
    """BLEU for a target language, and the name of its signature."""
    language = target.partition("-")[0]
    wanted, *others = _TOKENIZERS.get(language, ("13a",))
    metric, used = _load(wanted), wanted
    if isinstance(metric, str):
        (used,) = others
        metric = _load(used)
        notes.append(
            f"BLEU into {language_name(target)} takes sacrebleu's tokenizer {used}, as {wanted} is not installed "
            f"(pip install 'sacrebleu[{language}]')."
        )
    return metric, "BLEU" if used == "13a" else f"BLEU ({target})"


@functools.cache
def _load(tokenizer: str) -> sacrebleu.BLEU | str:
    """BLEU with a tokenizer, or why it cannot be had: sacrebleu downloads some, and would wait without limit."""
    found: list[sacrebleu.BLEU | str] = []

    def load() -> None:
        try:
            found.append(sacrebleu.BLEU(tokenize=tokenizer, force=True))
        except (Exception, SystemExit) as error:  # it exits where a certificate is refused
            found.append(" ".join(str(error).split()) or type(error).__name__)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return found[0] if found else f"no answer in {_PATIENCE} seconds"


def _add_comet(result: Result, checkpoint: str) -> None:
    """COMET of all directions, by its own program."""
    columns = {"sources": [], "outputs": [], "references": []}
    for (source, target), lines in result.outputs.items():
        for column, texts in zip(
            columns.values(), (result.sentences[source], lines, result.sentences[target]), strict=True
        ):
            column += [" ".join(text.split()) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in columns]
        for file, lines in zip(files, columns.values(), strict=True):
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        command = [COMET, "-s", files[0], "-t", files[1], "-r", files[2], "--model", Path(checkpoint).expanduser()]
        command += ["--to_json", Path(folder, "scores.json"), "--only_system", "--quiet"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            result.notes.append(f"No COMET: {COMET} failed ({reason}).")
            return
        (segments,) = json.loads(Path(folder, "scores.json").read_text(encoding="utf-8")).values()
    scores = iter([segment["COMET"] for segment in segments])
    for pair, lines in result.outputs.items():
        sums_NxS = np.array([[next(scores), 1] for _ in lines], np.float64)
        result.measures[pair]["COMET"] = Sums(float(ratio(sums_NxS.sum(axis=0))), sums_NxS, ratio)
    result.signatures["COMET"] = checkpoint


def _add_rates(result: Result, cut: Mapping[Direction, Sequence[bool]]) -> None:
    result.signatures["off_target"] = f"py3langid:{importlib.metadata.version('py3langid')}|probability:<{LEAST}"
    for (source, target), lines in result.outputs.items():
        text_N, every_N = np.array([bool(line) for line in lines]), np.ones(len(lines), bool)
        pairs = zip(map(chance.bare, lines), map(chance.bare, result.sentences[source]), strict=True)
        rates = {"copy": (np.array([a == b != "" for a, b in pairs]), every_N), "empty": (~text_N, every_N)}
        rates["cut"] = np.array(cut[source, target]), every_N
        label = label_of(target)
        if label is not None and text_N.any():
            off_N = np.array([bool(line) and is_improbable(line, label) for line in lines])
            rates = {"off_target": (off_N, text_N)} | rates
        for name, (hits_N, of_N) in rates.items():
            sums_NxS = np.stack([hits_N, of_N], axis=1).astype(np.float64)
            result.measures[source, target][name] = Sums(float(ratio(sums_NxS.sum(axis=0))), sums_NxS, ratio)


def _notes_on_identifier(references: Mapping[str, Sequence[str]]) -> list[str]:
    """What it does not know, and where it is wrong, which the references show."""
    notes, wrong = [], []
    for code, lines in references.items():
        label = label_of(code)
        if label is None:
            notes.append(f"No off-target rate of {language_name(code)}, which the language identifier does not know.")
        elif (rate := np.mean([is_improbable(line, label) for line in lines])) >= _NOTED:
            wrong.append(f"{language_name(code)} {100 * rate:.1f}%")
    if wrong:
        notes.append(f"The language identifier calls references off-target, too: {', '.join(wrong)}.")
    return notes


def scores(result: Result) -> dict[Place, Score]:
    """Each metric of a direction, and its mean over the directions out of the pivot (`en-x`), into it (`x-en`) and
    beside it (`x-y`).

    Of chrF++ also what chance has of it (`chrF++_floor`), and how much more there is (`chrF++_above_floor`); besides,
    the share of distinct outputs. A mean is over the directions that have the metric, and compares with means over the
    same ones.
    """
    found: dict[Place, Score] = {}
    for pair, measures in result.measures.items():
        name = "-".join(pair)
        found |= {Place(metric, direction=name): of_sums(sums) for metric, sums in measures.items()}
        if floor := result.floors.get(pair):
            above = _difference(measures[SCORED], floor)
            found[Place(FLOOR, direction=name)] = of_sums(floor)
            found[Place(ABOVE_FLOOR, direction=name)] = of_sums(above)
        lines = result.outputs[pair]
        found[Place("distinct", direction=name)] = Score(chance.distinct(lines), len(lines))
    metrics = dict.fromkeys(place.measure for place in found)
    for average, pairs in averages(result.outputs, result.pivot).items():
        for metric in metrics:
            of = {pair: found.get(Place(metric, direction="-".join(pair))) for pair in pairs}
            of = {pair: score for pair, score in of.items() if score}
            if of:
                found[Place(metric, direction=average)] = mean(of.values(), unit=tuple(of))
    return found


def _difference(score: Sums, floor: Sums) -> Sums:
    """Of two scores with as many sums over the same sentences."""
    sums_NxS, width = np.concatenate([score.sums_NxS, floor.sums_NxS], axis=1), score.sums_NxS.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return score.score(sums[..., :width]) - floor.score(sums[..., width:])

    return Sums(score.value - floor.value, sums_NxS, difference)


def samples(results: Mapping[str, Result]) -> list[Sample]:
    """Some outputs of every model, by its name: the first sentences, of directions spread over all."""
    first = next(iter(results.values()))
    directions = list(first.outputs)
    shown = directions[:: math.ceil(len(directions) / _SAMPLES)]
    each = _SAMPLES // len(shown)
    return [
        Sample(
            f"{source}-{target}",
            first.sentences[source][n],
            first.sentences[target][n],
            {name: result.outputs[source, target][n] for name, result in results.items()},
        )
        for source, target in shown
        for n in range(len(first.outputs[source, target][:each]))
    ]

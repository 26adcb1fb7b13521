"""The study's measurements and tables: nothing is measured on training text, intervals are Student's, seeds pair."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import scipy.stats

from benchmarks.study import arms, base, measure, tables


@pytest.mark.skipif(not base.DATA.is_dir(), reason=f"needs the study's data ({base.DATA})")
def test_nothing_is_measured_on_training_text():
    tests, trained = measure.read(base.DATA), set()
    files = *base.DATA.glob("train_parallel/pairs/*.train.jsonl.gz"), *base.DATA.glob("instruct/*.train.jsonl.gz")
    for line in (line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()):
        record = json.loads(line)
        trained |= {record[name] for name in ("src", "tgt", "instruction", "input", "output") if record.get(name)}
    multiway = *tests.multiway.values(), tests.text, tests.premises, *tests.apart.values()
    sentences = {sentence for by_language in multiway for of in by_language.values() for sentence in of}
    sentences |= {sentence for pairs in tests.tatoeba.values() for pair in pairs for sentence in pair}
    assert len(sentences) > 10_000 and not sentences & trained


def _measured(at_2: float, seed: int) -> dict:
    """Of a model with 4 layers: retrieval is `at_2` at layer 2 and 0 elsewhere."""
    curve, flat = [0.0, 0.0, at_2, 0.0, 0.0], [0.5] * 4 + [0.75]
    of = {"retrieval": {"de": curve, "zh": [0.0] * 5}, "mexa": {"de": curve, "zh": curve}}
    of |= {name: flat for name in ("language_probe", "language_variance", "meaning_variance")}
    stage = {"alignment": {"FLORES-200": of, "NTREX-128": of, "Tatoeba": {"retrieval": of["retrieval"]}}}
    score = {"chrF++": 10.0 + seed, "off_target": 0.25, "copy": 0.0, "empty": 0.0}
    use = {
        "perplexity": {code: {"value": 2.0, "bits_per_byte": bits} for code, bits in (("en", 1), ("de", 2), ("zh", 4))},
        "choices": {"en": 0.5, "zh": 0.6},
        "translation": {pair: score for pair in ("en-de", "de-en", "en-zh", "zh-en", "de-zh", "zh-de")},
    }
    return {"stage1": stage, "stage2": stage | use}


@pytest.fixture
def results(tmp_path) -> dict:
    """Two arms with seeds 0 to 2, a third without seed 2."""
    retrieval = {"next-token": (0.1, 0.2, 0.4), "alignx": (0.3, 0.5, 0.6), "layer-2": (0.3, 0.5)}
    for arm, values in retrieval.items():
        for seed, value in enumerate(values):
            folder = tmp_path / "runs" / arm / str(seed)
            folder.mkdir(parents=True)
            (folder / "measured.json").write_text(json.dumps(_measured(value, seed)))
            facts = {"steps": 1, "tokens": 2, "pairs": 3, "seconds": 4.0, "fill": 0.5, "after": {}}
            facts["config"] = {"objective": {"contrastive": {"layer": 2 if arm == "layer-2" else None}}}
            (folder / "done.json").write_text(json.dumps({"name": arm, "stage1": facts, "stage2": facts}))
    (tmp_path / "measured.json").write_text(json.dumps({"base": _measured(0.2, 0)["stage2"]}))
    (tmp_path / "heldout.json").write_text(json.dumps({"de": {"perplexity": 2.0, "bits_per_byte": 1.0}}))
    return tables.collect(tables.Options(tmp_path / "runs", tmp_path / "model"))


def test_figures_are_taken_at_the_aligned_layer_and_averaged(results):
    of = results["arms"]["alignx"]["1"]["stage2"]
    assert of["retrieval, FLORES-200"] == pytest.approx(25.0) and of["MEXA, NTREX-128"] == pytest.approx(50.0)
    assert of["language, last layer, FLORES-200"] == 75 and of["language, aligned layer, FLORES-200"] == 50
    assert (of["bits a byte, en"], of["bits a byte, others"]) == (1, 3)
    assert of["chrF++, x-y"] == 11 and of["off-target, en-x"] == 25 and of["XCOPA, others"] == 60


def test_a_difference_is_paired_by_seed(results):
    found = tables.difference(results, "alignx", "next-token", "stage1", "retrieval, FLORES-200")
    own, other = np.array([15.0, 25, 30]), np.array([5.0, 10, 20])
    wanted = scipy.stats.ttest_rel(own, other).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((35 / 3, wanted.low, wanted.high))
    assert tables.difference(results, "layer-2", "alignx", "stage1", "retrieval, FLORES-200").value == 0
    assert tables.difference(results, "contrastive", "alignx", "stage1", "retrieval, FLORES-200") is None


def _of_base(results: dict, heldout: float, **runs: dict) -> dict:
    base = results["bases"][0] | {"seeds": sorted({seed for of in runs.values() for seed in of})}
    losses = {"de": {"perplexity": heldout, "bits_per_byte": 1.0}}
    return {"bases": [base | {"heldout": losses}], "arms": {name.replace("_", "-"): of for name, of in runs.items()}}


def test_runs_are_added_to_those_that_are_there(results):
    earlier = json.loads(json.dumps(results))  # as a file has it
    more = _of_base(results, 2.0, layer_6={"0": {}}, alignx={"1": {"stage1": 1}, "3": {}})
    found = tables.added(more, earlier)
    three = ["0", "1", "2"]
    assert {arm: list(of) for arm, of in found["arms"].items()} == {
        "next-token": three,
        "alignx": [*three, "3"],
        "layer-2": ["0", "1"],
        "layer-6": ["0"],
    }
    assert found["arms"]["alignx"]["1"] == {"stage1": 1}  # run again, the new one counts
    assert [of["seeds"] for of in found["bases"]] == [[*three, "3"]]


def test_a_seed_has_one_base(results):
    other = np.nextafter(2.0, 3.0)
    found = tables.added(_of_base(results, other, alignx={"3": {}}), results)
    assert [of["seeds"] for of in found["bases"]] == [["0", "1", "2"], ["3"]]
    assert [of["heldout"]["de"]["perplexity"] for of in found["bases"]] == [2.0, other]
    again = tables.added(_of_base(results, other, alignx={"4": {}}), found)
    assert [of["seeds"] for of in again["bases"]] == [["0", "1", "2"], ["3", "4"]]
    with pytest.raises(SystemExit, match="seed 2 from another base model"):
        tables.added(_of_base(results, other, alignx={"2": {}, "3": {}}), results)


def test_figures_of_several_bases_are_averaged(results):
    one, other = results["bases"][0], dict(results["bases"][0])
    other |= {"seeds": ["3"], "retrieval, NTREX-128": 20.0, "heldout": {"de": {"perplexity": 3.0, "bits_per_byte": 2}}}
    found = tables.of_choices(results | {"bases": [one, other]})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found["choices"].splitlines()]
    assert lines[2][lines[0].index("retrieval, NTREX-128, stage 1")] == "15.0"
    assert found["choices base"].splitlines()[2:] == [
        "| perplexity (seeds 0, 1, 2) | 2 |",
        "| bits a byte (seeds 0, 1, 2) | 1.00 |",
        "| perplexity (seed 3) | 3 |",
        "| bits a byte (seed 3) | 2.00 |",
    ]


def test_one_seed_has_no_interval():
    found = tables.paired([2.0])
    assert found.value == 2 and np.isnan(found.low) and tables._cell(found, "") == "+2.0"


def test_bold_is_what_leaves_zero_out():
    assert tables._cell(tables.Difference(-1.0, -2.0, -0.04), "") == "**−1.0 [−2.0, −0.0]**"
    assert tables._cell(tables.Difference(1.0, -0.5, 2.5), "bits") == "+1.000 [−0.500, +2.500]"


def test_tables_show_arms_that_were_run(results, monkeypatch):
    monkeypatch.setattr(arms, "ABLATION", {name: {} for name in ("next-token", "alignx")})
    found = tables.tables(results)
    lines = found["stage 1"].splitlines()
    assert lines[0] == "|  | base | next-token | alignx − next-token | alignx − contrastive |"
    assert lines[2].startswith("| retrieval, FLORES-200 | 10.0 | 11.7 | **+11.7 [")
    assert {line.split(" ")[1] for line in found["languages"].splitlines()[2:]} == {"de", "zh", "rank"}


def test_choices_are_set_against_alignx_with_the_variance_of_all_of_them(results):
    found = tables.of_choices(results)
    lines = [[cell.strip() for cell in line.split("|")[1:]] for line in found["choices"].splitlines()]
    column = lines[0].index("retrieval, NTREX-128, stage 1")
    # next-token: -10, -15 and -10; layer-2: 0 and 0. Together 16.67 of squares with 3 degrees of freedom.
    half = 3.182446 * np.sqrt(50 / 3 / 3)
    assert {line[0]: (line[1], line[column]) for line in lines[2:]} == {
        "base": ("", "10.0"),
        "alignx": ("3", "23.3 (15.0–30.0)"),
        "next-token": ("3", "**−11.7**"),
        "layer-2": ("2", "+0.0"),
        "95 % interval of 2 seeds": ("2", f"±{half / np.sqrt(2):.1f}"),
        "95 % interval of 3 seeds": ("3", f"±{half / np.sqrt(3):.1f}"),
    }
    assert found["choices base"].splitlines()[2:] == ["| perplexity | 2 |", "| bits a byte | 1.00 |"]


def test_one_seed_each_has_no_interval(results):
    one = results | {"arms": {arm: {"0": of["0"]} for arm, of in results["arms"].items()}}
    assert tables.half_width(one, "alignx", "stage1", "retrieval, NTREX-128") == np.inf
    assert "95 %" not in tables.of_choices(one)["choices"] and "**" not in tables.of_choices(one)["choices"]

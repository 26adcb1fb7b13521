"""evaluation.json: a row a line, read back as it was written; what does not fit is named."""

import json

import pytest

from alignx_jax.evaluation import rows
from tests.evaluation import examples


@pytest.fixture(scope="module")
def results():
    return examples.results(models=3, languages=3, layers=2)


def test_results_come_back_as_they_were_written(results):
    assert rows.from_json(results.to_json().encode()) == results


def test_a_table_of_another_program_is_the_same(results):
    """`pandas.DataFrame(found["rows"], columns=found["columns"])`."""
    text = results.to_json()
    found = json.loads(text)
    assert found["format"] == 2 and found["columns"] == list(rows.Row._fields)
    assert len(found["rows"]) == len(results.rows) and text.count('\n  ["base model", ') > 100
    of = [r for r in found["rows"] if r[1] == "retrieval" and r[2] == 1 and r[3:5] == [None, None] and r[-1] is None]
    assert [row[0] for row in of] == [model.name for model in results.models]


def test_a_number_has_six_digits(results):
    changed = examples.put(results, 0, "cka", 0.123456789, layer=1)
    assert rows.from_json(changed.to_json().encode()).find(results.models[0], "cka", 1).value == 0.123457


def test_rows_are_found_by_what_they_are_of(results):
    base, one, control = results.models
    assert results.find(one, "retrieval", "aligned") == results.find(one, "retrieval", 1)
    assert results.find(one, "language_probe", "last").layer == 2
    assert results.find(one, "chrF++", direction="en-ar").direction == "en-ar"
    assert results.find(one, "bits_per_byte", language="en", against=base).against == "base model"
    assert results.find(one, "retrieval", 9) is None and results.find(base, "retrieval", 1, against=one) is None
    assert results.find(one, "retrieval", "aligned", against=control).against == "next-token only"


def test_a_number_that_is_not_finite_is_not_found(results):
    changed = examples.put(results, 0, "uniformity", None, layer=1)
    assert changed.find(changed.models[0], "uniformity", 1) is None
    assert changed.curve(changed.models[0], "uniformity") is None
    assert results.curve(results.models[0], "uniformity").shape == (3,)


def test_a_pair_alone_is_compared_with_its_control(results):
    pair = results.against_control(results.controls[0])
    assert [model.name for model in pair.models] == ["next-token only", "stage 1"]
    assert pair.base.name == "next-token only" and pair.compared() == [results.models[1]]
    assert pair.find(pair.models[1], "retrieval", "aligned", against=pair.base).against == "next-token only"


def test_nothing_is_compared_with_a_single_model():
    alone = examples.results(models=1)
    assert alone.base is None and alone.compared() == []


@pytest.mark.parametrize(
    "direction, codes, name",
    [
        ("de-en", ("de", "en"), "German to English"),
        ("zh-Hant-en", ("zh-Hant", "en"), "Traditional Chinese to English"),
        ("en-zh-Hant", ("en", "zh-Hant"), "English to Traditional Chinese"),
        ("zh-Hant-x", ("zh-Hant", "x"), "Traditional Chinese to others"),
        ("x-en", ("x", "en"), "others to English"),
        ("x-y", ("x", "y"), "between others"),
    ],
)
def test_directions_by_name(direction, codes, name):
    assert rows.direction_codes(direction) == codes and rows.direction_name(direction) == name


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("format",), 1, r"format: has to be 2, of this version"),
        (("columns", 0), "name", r"columns: have to be model, measure, "),
        (("baseline",), "another", r"baseline: no model is called another"),
        (("controls", 0, 1), "another", r"controls\.0: no model is called another"),
        (("rows", 5, 0), "another", r"rows\.5\.model: no model is called another"),
        (("rows", -1, 9), "another", r"rows\.\d+\.against: no model is called another"),
        (
            ("translation", "samples", 1, "outputs"),
            {"x": ""},
            r"translation\.samples\.1\.outputs: no model is called x",
        ),
        (("rows", 5, 2), 3, r"rows\.5\.layer: 3, and base model has 2 layers"),
        (("rows", 5, 5), "0.5", r"rows\.5\.5: .* number"),
        (("rows", 5, 4), "klingon", r"rows\.5\.4: .*klingon"),
        (("rows", 5, 3), "de", r"rows\.5\.3: .*'de': no two language codes"),
        (("models", 1, "align_layer"), 7, r"models\.1\.align_layer: 7, and stage 1 has 2 layers"),
        (("models", 1, "parameters"), "many", r"models\.1\.parameters: .* integer"),
        (("sentences", "pivot"), None, r"sentences\.pivot: "),
    ],
)
def test_what_does_not_fit_is_named(results, path, value, said):
    found = json.loads(results.to_json())
    of = found
    for key in path[:-1]:
        of = of[key]
    of[path[-1]] = value
    with pytest.raises(ValueError, match=f"^{said}"):
        rows.from_json(json.dumps(found).encode())


def test_a_file_of_the_first_format_is_refused_by_its_format(results):
    with pytest.raises(ValueError, match=r"^format: has to be 2"):
        rows.from_json(b'{"format": 1, "models": []}')
    with pytest.raises(ValueError, match=r"^format: has to be 2"):
        rows.from_json(b"[3]")

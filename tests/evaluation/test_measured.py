"""What processes measure apart; the measurements themselves: test_evaluate.py."""

import shutil

import pytest

from alignx_jax import hosts, sharding
from alignx_jax.config import Config, EvaluationConfig
from alignx_jax.data import tokenizer
from alignx_jax.evaluation import evaluate, measured, scoring, translation, translation_scores
from alignx_jax.training import runs


@pytest.mark.parametrize(("index", "does", "has"), [(0, ["scores", "meets"], "a result"), (1, ["meets"], None)])
def test_one_process_scores_translations_and_all_meet_after_it(monkeypatch, index, does, has):
    done = []
    monkeypatch.setattr(hosts, "index", lambda: index)
    monkeypatch.setattr(hosts, "gather", lambda what, value: done.append("meets"))
    monkeypatch.setattr(translation_scores, "score", lambda *_: done.append("scores") or "a result")
    assert measured._scores({}, {}, {}, Config()) == has
    assert done == does


def test_translations_end_where_the_model_ends_its_turns(monkeypatch, tmp_path):
    class Seen(Exception):
        """The tokens."""

    def translate(*_, eos_ids, **options):
        raise Seen(*eos_ids)

    folder = shutil.copytree(runs.SAMPLE_MODEL, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [77, 5]}')
    config = Config(evaluation=EvaluationConfig(languages=("de",)))
    material = evaluate.check(config)
    monkeypatch.setattr(translation, "translate", translate)
    monkeypatch.setattr(scoring, "perplexity", lambda *_, **options: {})
    monkeypatch.setattr(scoring, "continuation_choice", lambda *_, **options: {})
    monkeypatch.setattr(measured, "_alignment", lambda *_: ({}, None, {}))
    source = runs.find(str(folder))
    with pytest.raises(Seen) as seen:
        measured.measure(config, material, measured.Subject(source, 4, 8), sharding.make_mesh("1x1"), lambda *_: None)
    assert set(seen.value.args) == {tokenizer.load(folder).eos_id, 5, 77}

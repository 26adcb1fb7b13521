"""What processes measure apart; the measurements themselves: test_evaluate.py."""

import pytest

from alignx_jax import hosts
from alignx_jax.config import Config
from alignx_jax.evaluation import measured, translation_scores


@pytest.mark.parametrize(("index", "does", "has"), [(0, ["scores", "meets"], "a result"), (1, ["meets"], None)])
def test_one_process_scores_translations_and_all_meet_after_it(monkeypatch, index, does, has):
    done = []
    monkeypatch.setattr(hosts, "index", lambda: index)
    monkeypatch.setattr(hosts, "gather", lambda what, value: done.append("meets"))
    monkeypatch.setattr(translation_scores, "score", lambda *_: done.append("scores") or "a result")
    assert measured._scores({}, {}, Config()) == has
    assert done == does

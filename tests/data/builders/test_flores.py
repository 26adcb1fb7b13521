import pytest

from alignx_jax.data import pipeline
from alignx_jax.exits import UserError

ENGLISH = ["The river is wide.", "Bread is baked daily."]


@pytest.mark.parametrize("name", ["flores200", "flores101"])
def test_sentences_by_language(cache, name):
    found = pipeline.multiway(f"{name}:dev", cache_folder=str(cache))
    assert found["en"] == ENGLISH
    assert found["zh"] == ["河很宽。", "面包每天烘烤。"] and found["zh-Hant"][0] == "河很寬。"
    assert pipeline.multiway(f"{name}:devtest", ["deu"], str(cache)) == {"de": ["Die Bibliothek öffnet um neun."]}


def test_of_two_varieties_of_a_language_the_first_is_taken(cache):
    found = pipeline.multiway("flores200:dev", cache_folder=str(cache))
    assert set(found) == {"acm", "de", "en", "fa", "zh", "zh-Hant"}
    assert found["fa"][0].startswith("رود")  # pes_Arab, not prs_Arab


def test_a_split_is_named(cache):
    with pytest.raises(UserError, match="flores200: name a split, flores200:dev or flores200:devtest"):
        pipeline.multiway("flores200", cache_folder=str(cache))

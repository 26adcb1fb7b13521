from alignx_jax.data import corpora, pipeline
from alignx_jax.data.builders import Ntrex128


def test_the_source_and_the_first_variety_of_each_language(cache):
    found = pipeline.multiway("ntrex128:test", cache_folder=str(cache))
    assert set(found) == {"de", "en", "fr", "zh-Hant"}
    assert found["en"][0] == "Rain is expected on Monday."  # what was translated, not eng-GB
    assert found["fr"][0] == "De la pluie est attendue lundi."


def test_a_record_has_its_document_and_every_variety(cache):
    builder = corpora._build(Ntrex128, None, "multiway", cache)
    record = builder.as_data_source("test")[1]
    assert record["id"] == b"sports.2"
    assert list(record["translations"]["language"]) == [b"deu", b"eng", b"eng-GB", b"fra", b"fra-CA", b"zho-TW"]

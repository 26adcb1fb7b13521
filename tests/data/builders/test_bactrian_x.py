from alignx_jax.data import corpora
from alignx_jax.data.builders import BactrianX


def test_a_language_is_a_source_of_instructions(cache):
    assert len(BactrianX.BUILDER_CONFIGS) == 52
    corpus = corpora.prepare("instructions", "bactrian_x/de", cache, "stop")
    assert corpus.records([0, 1]) == [
        {
            "instruction": "Nenne drei Flüsse.",
            "input": "",
            "output": "Elbe, Rhein und Oder.",
            "language": "de",
            "origin": "de.json.gz: element 1",
        },
        {
            "instruction": "Fasse zusammen.",
            "input": "Ein langer Text.",
            "output": "Kurz.",
            "language": "de",
            "origin": "de.json.gz: element 2",
        },
    ]
    assert corpus.skipped == 1
    assert "de.json.gz: element 3: field 'output' is empty" in (corpus.folder / "skipped.txt").read_text()

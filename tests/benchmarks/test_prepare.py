import itertools
import json

from alignx_jax.data import readers
from benchmarks import prepare


def test_pairs_are_real_ones_each_with_its_number(tmp_path):
    lines = [{"src": f"Satz {n}", "tgt": f"Line {n}", "src_lang": "de", "tgt_lang": "en"} for n in (7, 8)]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = prepare._write(tmp_path, (str(source),), 5)
    pairs = [(r["source"], r["target"], r["source_language"]) for r in readers.read_parallel([file])]
    words = itertools.cycle(["7", "8"])
    assert pairs == [(f"Satz {word} {n}", f"Line {word} {n}", "de") for n, word in zip(range(5), words, strict=False)]

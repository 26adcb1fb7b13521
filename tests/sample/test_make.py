"""The committed tokenizer is what the script makes of the committed corpus. The model takes too long to make here."""

from alignx_jax.sample import make


def test_the_tokenizer_is_reproducible(tmp_path):
    make.train_tokenizer([record["text"] for record in make.read("parallel.train.jsonl.gz")], tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (make.HERE / "model" / name).read_bytes(), name

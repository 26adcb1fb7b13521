"""Tiny tokenizers of both kinds trained on the spot, and the real ones where they are."""

import io
import json
import pathlib

import pytest
import sentencepiece
import tokenizers

from alignx_jax.data import tokenizer
from tests.data.scripts import SENTENCES


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> pathlib.Path:
    """`bytes/tokenizer.json`, byte-level BPE, and `pieces/tokenizer.model`, SentencePiece BPE with byte fallback."""
    folder = tmp_path_factory.mktemp("tokenizers")
    lines = [*SENTENCES.values(), "### Instruction:", "### Input:", "### Response:"]
    for name in ("bytes", "pieces"):
        (folder / name).mkdir()
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines * 3, vocab_size=400, special_tokens=["<s>", "</s>"])
    bpe.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    bpe.save(str(folder / "bytes" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "bytes" / "tokenizer_config.json").write_text(json.dumps(config))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=560,
        byte_fallback=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "pieces" / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session", params=["bytes", "pieces", "llama2", "deepseek_r1"])
def any_tokenizer(request, tiny) -> tuple[pathlib.Path, tokenizer.Tokenizer]:
    """Each tokenizer with its folder: the two tiny ones, and two published ones where the shared data are."""
    if request.param in ("bytes", "pieces"):
        folder = tiny / request.param
    else:
        folder = request.getfixturevalue("shared") / "data" / "tokenizers" / request.param
    return folder, tokenizer.load(folder)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny) -> tokenizer.Tokenizer:
    return tokenizer.load(tiny / "bytes")

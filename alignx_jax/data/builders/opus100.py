"""OPUS-100: English and 99 other languages, up to a million pairs each, sampled from OPUS."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds

from alignx_jax.data import readers
from alignx_jax.data.builders.published import CODES, Published, names, unpacked
from alignx_jax.data.fields import BadLine, Record

SUPERVISED, ZERO_SHOT = CODES["opus100"], CODES["opus100 zero-shot"]
"""Of the pairs without English there are test sets alone."""

_URL = "https://object.pouta.csc.fi/OPUS-100/v1.0/opus-100-corpus-{}-v1.0.tar.gz"
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


class Opus100(Published):
    """Pairs of one configuration such as `de-en`, the two codes in the order of the alphabet, as published."""

    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=pair, description=f"The pair {pair}.") for pair in (*SUPERVISED, *ZERO_SHOT)
    ]
    FIELDS = ("source", "target", "source_language", "target_language", "origin")
    ABOUT = {  # noqa: RUF012
        "description": "An English-centric corpus of 100 languages, sampled from the OPUS collection: up to a million "
        "pairs for training, 2,000 each for development and test; and test sets of 15 pairs without English.",
        "homepage": "https://opus.nlpl.eu/OPUS-100",
        "license": "No licence of its own: every sentence keeps that of its source in OPUS. The publishers ask to cite "
        "the paper and to acknowledge OPUS.",
        "citation": """@inproceedings{zhang-etal-2020-improving,
  title = "Improving Massively Multilingual Neural Machine Translation and Zero-Shot Translation",
  author = "Zhang, Biao and Williams, Philip and Titov, Ivan and Sennrich, Rico",
  booktitle = "Proceedings of the 58th Annual Meeting of the Association for Computational Linguistics",
  year = "2020",
  url = "https://arxiv.org/abs/2004.11867",
}
@inproceedings{tiedemann-2012-parallel,
  title = "Parallel Data, Tools and Interfaces in {OPUS}",
  author = {Tiedemann, J{\\"o}rg},
  booktitle = "Proceedings of the Eighth International Conference on Language Resources and Evaluation",
  year = "2012",
}""",
    }

    @property
    def url(self) -> str:
        pair = self.builder_config.name
        return _URL.format("zeroshot" if pair in ZERO_SHOT else pair)

    def splits(self, archive: pathlib.Path) -> dict[str, Callable[[], Iterator[Record | BadLine]]]:
        pair, there = self.builder_config.name, set(names(archive))
        folder = f"opus-100-corpus/v1.0/{'zero-shot' if pair in ZERO_SHOT else 'supervised'}/{pair}"
        files = {
            split: [f"{folder}/opus.{pair}-{part}.{c}" for c in pair.split("-")] for split, part in _SPLITS.items()
        }
        return {
            split: functools.partial(self._pairs, archive, members)
            for split, members in files.items()
            if there.issuperset(members)  # some pairs are too small for development and test sets
        }

    def _pairs(self, archive: pathlib.Path, members: list[str]) -> Iterator[Record | BadLine]:
        with unpacked(archive, members, self.data_path) as (left, right):
            folder = left.parent
            for record in readers.read_moses(left, right, *self.builder_config.name.split("-")):
                yield self.relative(record, folder)

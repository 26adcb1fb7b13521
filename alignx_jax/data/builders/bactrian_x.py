"""Bactrian-X: 67,000 instructions in each of 52 languages, the answers by a language model."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds

from alignx_jax.data import readers
from alignx_jax.data.builders.published import CODES, Published
from alignx_jax.data.fields import BadLine, Record, language


class BactrianX(Published):
    """Instructions of one configuration, a language."""

    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=code, description=f"Instructions in {code}.") for code in CODES["bactrian_x"]
    ]
    FIELDS = ("instruction", "input", "output", "language", "origin")
    ABOUT = {  # noqa: RUF012
        "description": "The instructions of Alpaca and Dolly, translated into 51 languages by Google Translate, with "
        "answers of gpt-3.5-turbo in each language.",
        "homepage": "https://github.com/mbzuai-nlp/Bactrian-X",
        "license": "CC BY-NC 4.0",
        "citation": """@misc{li2023bactrianx,
  title = {Bactrian-X: A Multilingual Replicable Instruction-Following Model with Low-Rank Adaptation},
  author = {Haonan Li and Fajri Koto and Minghao Wu and Alham Fikri Aji and Timothy Baldwin},
  year = {2023},
  eprint = {2305.15011},
  archivePrefix = {arXiv},
}""",
    }

    @property
    def url(self) -> str:
        return f"https://huggingface.co/datasets/MBZUAI/Bactrian-X/resolve/main/data/{self.builder_config.name}.json.gz"

    def splits(self, archive: pathlib.Path) -> dict[str, Callable[[], Iterator[Record | BadLine]]]:
        return {"train": lambda: self._instructions(archive)}

    def _instructions(self, archive: pathlib.Path) -> Iterator[Record | BadLine]:
        code = language(self.builder_config.name, "language")
        for record in readers.read_instructions([archive]):
            record = self.relative(record, archive.parent)
            yield record if isinstance(record, BadLine) else record | {"language": code}

"""FLORES-101 and FLORES-200: 3,001 sentences of Wikimedia, translated by professionals, for evaluation."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator

from alignx_jax.data.builders.published import CODES, Multiway, names
from alignx_jax.data.fields import BadLine, Record

_TITLES = {
    "200": "No Language Left Behind: Scaling Human-Centered Machine Translation",
    "101": "The {FLORES}-101 Evaluation Benchmark for Low-Resource and Multilingual Machine Translation",
}


def _about(number: str, author: str, year: int, eprint: str) -> dict[str, str]:
    return {
        "description": f"FLORES-{number}: the same sentences of Wikinews, Wikijunior and Wikivoyage in every language; "
        "dev and devtest are published, the test set is not.",
        "homepage": "https://github.com/facebookresearch/flores",
        "license": "CC BY-SA 4.0",
        "citation": f"@article{{flores{number},\n  title = {{{_TITLES[number]}}},\n  author = {{{author}}},\n"
        f"  year = {{{year}}},\n  eprint = {{{eprint}}},\n  archivePrefix = {{arXiv}},\n}}",
    }


class _Flores(Multiway, skip_registration=True):
    SPLITS = ("dev", "devtest")
    ROOT: str

    def splits(self, archive: pathlib.Path) -> dict[str, Callable[[], Iterator[Record | BadLine]]]:
        there, found = set(names(archive)), {}
        for split in self.SPLITS:
            members = {code: f"{self.ROOT}/{split}/{code}.{split}" for code in self.LANGUAGES}
            members = {code: member for code, member in members.items() if member in there}
            if members:
                found[split] = functools.partial(self.aligned, archive, split, members)
        return found


class Flores200(_Flores):
    """FLORES-200, with its codes such as `deu_Latn`."""

    url = "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz"
    ROOT = "flores200_dataset"
    ABOUT = _about("200", "{NLLB Team} and Costa-juss{\\`a}, Marta R. and others", 2022, "2207.04672")
    LANGUAGES = tuple(CODES["flores200"])


class Flores101(_Flores):
    """FLORES-101, with its codes such as `deu` and `zho_simpl`."""

    url = "https://dl.fbaipublicfiles.com/flores101/dataset/flores101_dataset.tar.gz"
    ROOT = "flores101_dataset"
    ABOUT = _about("101", "Goyal, Naman and Gao, Cynthia and Chaudhary, Vishrav and others", 2021, "2106.03193")
    LANGUAGES = tuple(CODES["flores101"])

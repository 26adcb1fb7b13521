"""NTREX-128: the English news of WMT 2019, translated from English into 128 languages and varieties, for evaluation."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator

from alignx_jax.data.builders.published import CODES, Multiway, names
from alignx_jax.data.fields import BadLine, Record

_COMMIT = "8561f6a622db9edad1217683e5c83daefd8bb2bf"


class Ntrex128(Multiway):
    """NTREX-128, with its codes such as `deu` and `fra-CA`; `id` is the document of a line."""

    url = f"https://github.com/MicrosoftTranslator/NTREX/archive/{_COMMIT}.tar.gz"
    SPLITS = ("test",)
    ABOUT = {  # noqa: RUF012
        "description": "News Test References: newstest2019 with references in 128 languages, translated from English, "
        "1,997 lines with the documents that they belong to.",
        "homepage": "https://github.com/MicrosoftTranslator/NTREX",
        "license": "CC BY-SA 4.0",
        "citation": """@inproceedings{federmann-etal-2022-ntrex,
  title = "{NTREX}-128 {--} News Test References for {MT} Evaluation of 128 Languages",
  author = "Federmann, Christian and Kocmi, Tom and Xin, Ying",
  booktitle = "Proceedings of the First Workshop on Scaling Up Multilingual Evaluation",
  year = "2022",
  url = "https://aclanthology.org/2022.sumeval-1.4",
  pages = "21--24",
}""",
    }
    LANGUAGES = tuple(CODES["ntrex128"])

    def splits(self, archive: pathlib.Path) -> dict[str, Callable[[], Iterator[Record | BadLine]]]:
        root, there = f"NTREX-{_COMMIT}", set(names(archive))
        members = {code: f"{root}/NTREX-128/newstest2019-ref.{code}.txt" for code in self.LANGUAGES}
        members["eng"] = f"{root}/NTREX-128/newstest2019-src.eng.txt"
        members = {code: member for code, member in members.items() if member in there}
        ids = f"{root}/DOCUMENT_IDS.tsv"
        return {"test": functools.partial(self.aligned, archive, "test", members, ids)} if members else {}

"""What the builders of published data sets share: the archive from a folder or the network, checked records, counts.

Everything runs without TensorFlow, which TFDS needs to unpack archives; so the builders unpack the files that they read
by themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import posixpath
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums, downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from alignx_jax.data.fields import Bad, BadLine, Record, sentence, text
from alignx_jax.data.text_files import lines
from alignx_jax.exits import UserError

CHECKSUMS = pathlib.Path(__file__).with_name("checksums.tsv")
"""Size and SHA-256 of every archive that was registered; TFDS compares what it downloads."""

downloader.MAX_RETRIES = 4  # of TFDS's ten the last alone takes 100 seconds, without a network too

CODES: dict[str, list[str]] = json.loads(pathlib.Path(__file__).with_name("codes.json").read_text())
"""Configurations or languages of each data set, as it writes them."""


class Published(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Records of an archive in the order of its lines, with `FIELDS` of text.

    A line that gives no record is left out, counted in the metadata (`skipped`) and listed in `skipped.txt`: a
    published file is not for its reader to mend. The metadata's `content` changes with any of the records.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Where there is no network, put the archive, under the name that it is published by, "
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS += "into the manual directory; its address is that of the builder's `url`."
    url_infos: ClassVar = checksums.load_url_infos(CHECKSUMS)
    FIELDS: tuple[str, ...]
    ABOUT: ClassVar[dict[str, str]]
    """description, homepage, citation and license of the `DatasetInfo`."""

    @property
    def url(self) -> str:
        """The address of the archive of this configuration."""
        raise NotImplementedError

    def splits(self, archive: pathlib.Path) -> dict[str, Callable[[], Iterable[Record | BadLine]]]:
        """What reads each split that the archive has."""
        raise NotImplementedError

    def features(self) -> tfds.features.FeaturesDict:
        """The features of a record."""
        return tfds.features.FeaturesDict({field: tfds.features.Text() for field in self.FIELDS})

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=self.features(),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(skipped=0, content=""),
            **self.ABOUT,
        )

    def _split_generators(self, dl_manager):
        splits = self.splits(self._archive(dl_manager))
        if not splits:
            raise UserError(f"{self.url}: the archive has no file of {self.builder_config.name}; fetch it again")
        return {name: self._generate_examples(name, read) for name, read in splits.items()}

    def _generate_examples(self, split: str, read: Callable[[], Iterable[Record | BadLine]]):
        content, count = hashlib.blake2b(digest_size=10), 0
        with open(self.data_path / "skipped.txt", "a", encoding="utf-8") as skipped:
            for record in read():
                if isinstance(record, BadLine):
                    skipped.write(f"{record.origin}: {record.reason}\n")
                    self.info.metadata["skipped"] += 1
                    continue
                content.update(repr(sorted(record.items())).encode())
                yield count, record
                count += 1
        self.info.metadata["content"] += f"{split} {content.hexdigest()} "

    def _archive(self, dl_manager) -> pathlib.Path:
        """The archive in the manual directory, else downloaded.

        Raises:
          UserError: it is in neither place, or not what its checksum says.
        """
        name = posixpath.basename(self.url)
        with contextlib.suppress(AssertionError):  # no manual directory
            if (dl_manager.manual_dir / name).is_file():
                return pathlib.Path(dl_manager.manual_dir / name)
        try:
            return pathlib.Path(dl_manager.download(self.url))
        except NonMatchingChecksumError as error:
            raise UserError(
                f"{self.url}: not the file that was registered ({error}); delete it and try again"
            ) from None
        except Exception as error:  # of requests, urllib3 or TFDS
            raise UserError(
                f"{self.url}: cannot be downloaded ({type(error).__name__}: {error}); fetch it where there is a "
                f"network, and put {name} into the folder downloads/manual of --data.cache"
            ) from None

    @contextlib.contextmanager
    def unpacked(self, archive: pathlib.Path, members: Sequence[str]) -> Iterator[list[pathlib.Path]]:
        """Those members of a tar archive as files of a temporary folder, under their whole names."""
        with tempfile.TemporaryDirectory(dir=self.data_path) as folder, _tar(archive) as tar:
            missing, files = set(members), [pathlib.Path(folder, member) for member in members]
            for info in tar:
                name = posixpath.normpath(info.name)
                if name in missing and info.isfile():
                    file = pathlib.Path(folder, name)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with open(file, "wb") as to:
                        shutil.copyfileobj(tar.extractfile(info), to)
                    missing.remove(name)
            if missing:
                raise UserError(f"{archive}: no {sorted(missing)[0]} in it; fetch the archive again")
            yield files

    def relative(self, record: Record | BadLine, folder: pathlib.Path) -> Record | BadLine:
        """`record` with an origin that names the archive's member, not a temporary file in `folder`."""
        if isinstance(record, BadLine):
            return record._replace(origin=record.origin.removeprefix(f"{folder}/"))
        return record | {"origin": record["origin"].removeprefix(f"{folder}/")}


def names(archive: pathlib.Path) -> list[str]:
    """The files in a tar archive."""
    with _tar(archive) as tar:
        return [posixpath.normpath(info.name) for info in tar if info.isfile()]


@contextlib.contextmanager
def _tar(archive: pathlib.Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{archive}: a damaged archive ({error}); delete it, and fetch it again") from None


class Multiway(Published, skip_registration=True):
    """Sentences in every language of `LANGUAGES` that the archive has, translations of each other, for evaluation."""

    LANGUAGES: tuple[str, ...]
    """Codes as the data set writes them."""
    SPLITS: tuple[str, ...]
    STANDARD: ClassVar[dict[str, str]] = {}
    """Codes that no standard has, with one that means the same."""

    def features(self) -> tfds.features.FeaturesDict:
        translations = tfds.features.TranslationVariableLanguages(languages=self.LANGUAGES)
        return tfds.features.FeaturesDict({"id": tfds.features.Text(), "translations": translations})

    def aligned(self, archive: pathlib.Path, split: str, members: dict[str, str], ids: str | None = None):
        """A record for each line, from the members by language; `ids` is a member with an identifier a line."""
        with self.unpacked(archive, [*members.values(), *filter(None, [ids])]) as files:
            columns = [[(number, raw) for number, raw in lines(file)] for file in files]
        counts = {file: len(column) for file, column in zip([*members.values(), ids], columns, strict=False)}
        if len(set(counts.values())) > 1:
            raise UserError(f"{archive}: its files do not match line by line ({counts}); fetch the archive again")
        for number, row in enumerate(zip(*columns, strict=True), 1):
            try:
                found = {
                    code: sentence(text(raw), member)
                    for (code, member), (_, raw) in zip(members.items(), row, strict=False)
                }
                yield {"id": text(row[-1][1]).strip() if ids else f"{split}:{number}", "translations": found}
            except Bad as bad:
                yield bad.at(f"{split}:{number}")

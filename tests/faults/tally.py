"""What became of each injected fault, over all tests and processes: a table at the end of pytest, and JSON.

`ALIGNX_FAULTS_JSON` names a file to write.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.faults.program import Hang

_PROPERTY = "fault"
_HERE = "tests/faults/"
OUTCOMES = ("recovered", "lost", "hangs")


class Tally:
    """Of one test; pytest brings it from the process of the test to that of the report."""

    def __init__(self, record_property):
        self._record = record_property

    @contextlib.contextmanager
    def verdict(self) -> Iterator[list[str]]:
        """A list for the kinds of faults injected within. They are recovered from if nothing within fails."""
        injected, outcome = [], "lost"
        try:
            yield injected
            outcome = "recovered"
        except Hang:
            outcome = "hangs"
            raise
        finally:
            for kind in injected:
                self._record(_PROPERTY, [kind, outcome])


@pytest.fixture
def tally(record_property) -> Tally:
    return Tally(record_property)


def show(reporter) -> None:
    """The table, if faults were injected; below it the tests of faults that were skipped, for they injected none."""
    counts: dict[str, Counter] = {}
    reports = [r for r in (*reporter.stats.get("passed", ()), *reporter.stats.get("failed", ())) if r.when == "call"]
    for report in reports:
        for name, value in report.user_properties:
            if name == _PROPERTY:
                counts.setdefault(value[0], Counter())[value[1]] += 1
    skipped = Counter(r.longrepr[2] for r in reporter.stats.get("skipped", ()) if r.nodeid.startswith(_HERE))
    if counts or skipped:
        reporter.section("faults")
    if counts:
        _table(reporter, counts)
    for reason, tests in sorted(skipped.items()):
        reporter.write_line(f"{tests} {'test' if tests == 1 else 'tests'} not run: {reason.removeprefix('Skipped: ')}")


def _table(reporter, counts: dict[str, Counter]) -> None:
    rows = [{"fault": k, "injected": c.total(), **{o: c[o] for o in OUTCOMES}} for k, c in sorted(counts.items())]
    rows.append({"fault": "all", **{k: sum(row[k] for row in rows) for k in ("injected", *OUTCOMES)}})
    width = max(len(row["fault"]) for row in rows)
    reporter.write_line("".join([" " * width, *(f"{name:>11}" for name in ("injected", *OUTCOMES))]))
    for row in rows:
        reporter.write_line(f"{row['fault']:<{width}}" + "".join(f"{row[k]:>11}" for k in ("injected", *OUTCOMES)))
    if path := os.environ.get("ALIGNX_FAULTS_JSON"):
        pathlib.Path(path).write_text(json.dumps(rows, indent=1) + "\n")

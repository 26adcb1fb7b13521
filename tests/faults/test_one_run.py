"""One run a folder: a second one is refused, and does the first no harm."""

from __future__ import annotations

import pytest

from tests.faults.program import Stage

pytestmark = pytest.mark.slow


def test_a_second_run_on_a_folder_in_use_is_refused(bench, tally, tmp_path):
    run = tmp_path / "run"
    stage = Stage(run / "stage1")
    with tally.verdict() as injected, bench.start(run, 1) as running:
        assert running.until(lambda: running.step >= 3)
        with running.stopped():
            injected.append("second run on a folder in use")
            bench.finish(run, 1).sentence(1, str(stage.folder))
        ended = running.wait()
        assert ended.code == 0, ended
        bench.assert_undisturbed(run, 1)

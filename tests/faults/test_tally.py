"""What the report says of faults: counts that add up, and no test that vanishes because it was skipped."""

from types import SimpleNamespace as Made

from tests.faults import tally


def report(**stats) -> list[str]:
    lines = []
    tally.show(Made(stats=stats, section=lines.append, write_line=lines.append))
    return [" ".join(line.split()) for line in lines]


def test_skipped_tests_of_faults_are_told_below_the_table():
    done = Made(when="call", user_properties=[("fault", ["disk full", "recovered"]), ("other", 1)])
    lost = Made(when="call", user_properties=[("fault", ["disk full", "lost"])])
    skipped = [
        Made(nodeid=f"tests/{name}", longrepr=("a file", 1, f"Skipped: {reason}"))
        for name, reason in (("faults/a", "needs root"), ("faults/b", "needs root"), ("faults/c", "x"), ("d", "y"))
    ]
    table = ["faults", "injected recovered lost hangs", "disk full 2 1 1 0", "all 2 1 1 0"]
    told = ["2 tests not run: needs root", "1 test not run: x"]
    assert report(passed=[done], failed=[lost], skipped=skipped) == table + told
    assert report(skipped=skipped) == ["faults", *told]
    assert report(passed=[Made(when="call", user_properties=[])], skipped=skipped[3:]) == []

"""A stall is told, again and again, with what was under way and where."""

import io
import time

from alignx_jax import hosts
from alignx_jax.console import Screen
from alignx_jax.training import watch
from tests.training.test_stopping import until


def told(screen: Screen) -> list[str]:
    return screen.file.getvalue().splitlines()


def test_a_stall_is_told_with_the_stacks(tmp_path):
    screen = Screen(file=io.StringIO())

    def a_hung_call():
        until(lambda: len(told(screen)) >= 3)

    with watch.Watch(0.2, tmp_path, screen) as one:
        for step in range(10):  # never longer than the limit
            one.doing(f"waiting for the device at step {step}")
            time.sleep(0.02)
        assert told(screen) == []
        one.doing("waiting for the data of step 7")
        began = time.monotonic()
        a_hung_call()
        intervals = (time.monotonic() - began) / 0.2
    said = told(screen)
    assert 3 <= len(said) <= intervals + 1, "it keeps reporting, once in each interval"
    assert all("stalled: waiting for the data of step 7 for " in text for text in said)
    assert f"{tmp_path / 'stalls.txt'}" in said[0] and "--training.stall-seconds=0.2" in said[0]
    stacks = (tmp_path / "stalls.txt").read_text()
    assert "in a_hung_call" in stacks and stacks.count("waiting for the data of step 7") == len(said)


def test_another_process_than_the_first_tells_it_on_stderr_and_keeps_its_own_stacks(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hosts, "count", lambda: 4)
    monkeypatch.setattr(hosts, "index", lambda: 3)
    screen = Screen(file=io.StringIO())
    with watch.Watch(0.1, tmp_path, screen) as one:
        one.doing("waiting for the data of step 7")
        until((tmp_path / "stalls.3.txt").exists)
    said = capfd.readouterr().err
    assert not told(screen) and "warning: process 3 of 4: stalled: waiting for the data of step 7 for 0 s" in said
    assert f"in {tmp_path / 'stalls.3.txt'}" in said and not (tmp_path / "stalls.txt").exists()
    assert "process 3 of 4: waiting for the data of step 7" in (tmp_path / "stalls.3.txt").read_text()


def test_a_folder_that_is_gone_hides_no_stall(tmp_path):
    screen = Screen(file=io.StringIO())
    with watch.Watch(0.1, tmp_path / "gone", screen) as one:
        one.doing("saving step 3")
        until(lambda: told(screen))
    assert "saving step 3" in told(screen)[0] and "No such file" in told(screen)[0]


def test_the_screen_says_what_the_stage_does_when_it_is_silent(tmp_path):
    screen = Screen(silence=0.05, file=io.StringIO())
    with watch.Watch(60, tmp_path, screen) as one:
        one.doing("validating after step 0, batch 3 of 8")  # "starting" may have been said before
        assert until(lambda: "validating after step 0, batch 3 of 8 (0 s so far)" in screen.file.getvalue())

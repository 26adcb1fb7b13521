"""Traces of steps: the file is there and has something in it; steps that are not in the run are refused."""

import jax
import jax.numpy as jnp
import pytest

from alignx_jax.exits import StorageError, UserError
from alignx_jax.training import profiling


@pytest.mark.parametrize(("asked", "expected"), [(None, []), ("3", [3]), ("2-4", [2, 3, 4]), ("24", [24])])
def test_steps_are_counted_from_one(asked, expected):
    assert list(profiling.steps(asked, 24)) == expected


@pytest.mark.parametrize("asked", ["0", "5-3", "-3", "3-", "ten", "1,2", ""])
def test_what_names_no_steps_is_refused_before_the_run_is_known(asked):
    with pytest.raises(UserError, match=f"^--profile={asked}: no steps; give a step, counted from 1, or a range"):
        profiling.steps(asked, None)


@pytest.mark.parametrize("asked", ["25", "20-30"])
def test_steps_outside_the_run_are_refused(asked):
    with pytest.raises(UserError, match=f"^--profile={asked}: the run has steps 1 to 24; "):
        profiling.steps(asked, 24)


@pytest.mark.parametrize("last", [3, 2])  # the second run ends amid the steps
def test_the_trace_has_the_steps(tmp_path, last):
    profiler = profiling.Profiler(range(2, 4), tmp_path)
    square = jax.jit(lambda x: x @ x)
    x = jnp.ones((64, 64))
    for step in range(1, last + 1):
        x = profiler.run(step, lambda: square(x) / 64)  # noqa: B023
        assert not list(tmp_path.rglob("*")) or step == 3
    profiler.close()
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert b"train" in trace.read_bytes() and b"PjitFunction" in trace.read_bytes()
    profiler.close()


def test_a_trace_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    profiler = profiling.Profiler(range(1, 3), tmp_path / "file" / "profile")
    profiler.run(1, lambda: jnp.ones(3))
    with pytest.raises(StorageError, match=rf"^{tmp_path}/file/profile: the trace .* \(.*not a directory\); make room"):
        profiler.close()
    profiler.close()  # is not attempted, and told, once more
    (tmp_path / "file").unlink()
    jax.profiler.stop_trace()  # of JAX, for the tests after this one

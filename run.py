"""The one program of alignx_jax: `python run.py --stage=1 --mesh=8x1`; `--help` shows every setting.

Each stage prints what it loads, shows its progress, and ends with what changed and where the results lie.
"""

from __future__ import annotations

import pathlib
import shlex
import sys
from typing import NoReturn

import jax

from alignx_jax import command_line, console, exits, hosts, sharding, storage
from alignx_jax.exits import UserError
from alignx_jax.planning import machines, xla_flags
from alignx_jax.stages.evaluate import evaluate, models_of
from alignx_jax.stages.everything import everything
from alignx_jax.stages.export import export
from alignx_jax.stages.plan import plan
from alignx_jax.stages.prepare import prepare
from alignx_jax.stages.session import Session, agree
from alignx_jax.stages.train import stage_2_start, train
from alignx_jax.training import checkpoints, stopping, wandb_log

_REMOTE = "gs://: {}; see to it that the bucket is there and may be read and written, and start the same command again"


def leave(code: int, what: object) -> NoReturn:
    """Ends with one line on stderr: what happened, and what happened besides."""
    text = exits.one_line("; ".join([str(what), *getattr(what, "__notes__", [])]))
    if code == exits.USER:
        sys.exit(f"run.py: {text}")
    console.note(f"run.py: {text}")
    stopped = SystemExit(code)
    stopped.add_note(text)
    raise stopped


@hosts.together()
def main(arguments: list[str]) -> None:
    try:
        with stopping.Stop() as stop:
            start(arguments, stop)
    except UserError as error:
        leave(exits.USER, error)
    except exits.Diverged as error:
        error.add_note(f"again: python run.py {shlex.join(arguments)}")
        leave(exits.DIVERGED, error)
    except exits.StorageError as error:
        leave(exits.STORAGE, error)
    except exits.Interrupted as error:
        leave(exits.INTERRUPTED, error)
    except OSError as error:
        if said := storage.failed(error):
            leave(exits.STORAGE, _REMOTE.format(said))
        code = exits.of_os_error(error)
        if error.filename is None and code == exits.USER:
            raise
        where = f"{error.filename}: " if error.filename else ""
        leave(code, f"{where}{error.strerror}; give a path that can be read and written")
    except Exception as error:
        if (said := storage.failed(error)) is None:
            raise
        leave(exits.STORAGE, _REMOTE.format(said))


def start(arguments: list[str], stop: stopping.Stop) -> None:
    inherited: list[str] = []
    config = command_line.parse(arguments, inherited.extend)
    xla_flags.apply()
    if config.stage == "plan":
        on = machines.find(config)
        screen = console.Screen()
        with screen.under_way("--stage=plan"):
            plan(Session(config, on.mesh(config.mesh), screen, stop, arguments), on)
        return
    if config.stage in ("1", "2", "all"):
        wandb_log.check(config)
    with console.Screen(quiet=config.hosts.index != 0).under_way("waiting for the other processes"):
        hosts.initialize(config.hosts)
    agree(config)
    sharding.prepare_devices(config.mesh, hosts.count())
    screen, mesh = console.Screen(quiet=not hosts.is_first()), sharding.make_mesh(config.mesh)
    # Several processes on CPUs run collectives of programs that are read back in different orders (dev/decisions.md).
    if hosts.count() == 1 or mesh.devices.flat[0].platform != "cpu":
        compiled = pathlib.Path(config.data.cache).expanduser() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    session = Session(config, mesh, screen, stop, arguments)
    with jax.set_mesh(session.mesh), screen.under_way(f"--stage={config.stage}"):
        match config.stage:
            case "prepare":
                prepare(session)
            case "1":
                train(session, "1", "stage1", config.model)
            case "2":
                if inherited:
                    session.line("from stage 1:", ", ".join(name.replace("_", "-") for name in inherited))
                train(session, "2", "stage2", stage_2_start(session))
            case "evaluate":
                evaluate(session, models_of(session))
            case "export":
                export(session)
            case "all":
                everything(session)


if __name__ == "__main__":
    console.guard()
    checkpoints.hide_late_writes()
    main(sys.argv[1:])

"""Plans as tables on screen; docs/plan.md says how to read them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from alignx_jax.planning.machines import Machine
from alignx_jax.planning.plan import Plan

_GIB = 2**30


def of_one(plan: Plan, on: Machine) -> Table:
    """Everything that is known of one plan; of one chip and one step."""
    table = Table(title=f"stage 1 on {on.topology}, a chip and step", title_justify="left", show_header=False)
    table.add_row("settings", ", ".join(f"{name} {value}" for name, value in plan.settings.items()))
    table.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
    if plan.refusal:
        table.add_row("fits", Text.assemble(("no", "bold red"), f": {plan.refusal}"))
        return table
    verdict = ("yes", "bold green") if plan.fits else ("no", "bold red")
    table.add_row("fits", Text.assemble(verdict, f": {_bytes(plan.total_bytes)} of {_bytes(plan.capacity)}"))
    table.add_row("  arguments", f"{_bytes(plan.argument_bytes)}, {_state(plan)}")
    table.add_row("  temporaries", _bytes(plan.temporary_bytes))
    table.add_row("model FLOPs", f"{_flops(plan.model_flops)}, without causal halving {_flops(plan.model_flops_full)}")
    table.add_row("compiled FLOPs", f"{_flops(plan.compiled_flops)}, {plan.ratio:.2f} of the model's")
    table.add_row("HBM moved", _bytes(plan.hbm_bytes))
    table.add_row("interconnect", f"{_bytes(sum(plan.sent_bytes.values()))} sent")
    for kind, size in sorted(plan.sent_bytes.items(), key=lambda item: -item[1]):
        table.add_row(f"  {kind}", _bytes(size))
    if plan.seconds:
        parts = ", ".join(f"{what} {seconds:.3f} s" for what, seconds in plan.seconds.items())
        table.add_row("at best", parts)
        table.add_row("step", f"at least {plan.step_seconds:.3f} s, bound by {plan.bound}")
        table.add_row("MFU", f"at most {plan.mfu:.0%}")
    else:
        table.add_row("step", "not estimated: the figures of this host are not known")
    for caveat in plan.caveats:
        table.add_row("note", caveat)
    return table


def of_search(plans: Sequence[Plan]) -> Table:
    """One line a plan, in the order in which they were tried."""
    table = Table(
        title="search", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )  # 80 columns are enough
    varied = {"mesh": "mesh", "accumulation": "micro-batches", "remat": "remat", "moment_dtype": "moment"}
    for name in (*varied.values(), "GiB", "best, s", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        results = ("does not fit", "", "")
        if not plan.refusal:
            step = f"{plan.step_seconds:.3f}" if plan.seconds else ""
            mfu = f"{plan.mfu:.0%}" if plan.seconds else ""
            results = (f"{plan.total_bytes / _GIB:.2f}" if plan.fits else "does not fit", step, mfu)
        table.add_row(*(str(plan.settings[name]) for name in varied), *results)
    return table


def _state(plan: Plan) -> str:
    if plan.aliased_bytes >= plan.state_bytes:
        return f"of which the state, {_bytes(plan.state_bytes)}, is updated in place"
    return f"of which the state is {_bytes(plan.state_bytes)} and {_bytes(plan.aliased_bytes)} are updated in place"


def _bytes(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"


def _flops(count: float) -> str:
    return f"{count / 1e12:.2f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"

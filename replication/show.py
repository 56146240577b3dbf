"""What ``kvstore region`` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvstore.cli.output import ago, note, number, print_json, print_table

if TYPE_CHECKING:
    from replication.copier import Outcome
    from replication.cycle import Cycle, FlowReport, Progress
    from replication.manifest import HotBlock


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar for each flow on a terminal; yields what is to be called for each block."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Bars(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def advance(report: FlowReport, block: HotBlock, outcome: Outcome) -> None:
            if report.flow not in tasks:
                tasks[report.flow] = bars.add_task(f"from {report.source}", total=report.plan.nbytes)
            bars.advance(tasks[report.flow], block.nbytes)

        yield advance


def show_cycle(cycle: Cycle, json: bool, done: bool) -> None:
    """``done``: it was carried out, not only planned."""
    if json:
        print_json(
            {
                "flows": [_flow_json(report, done) for report in cycle.flows],
                "problems": cycle.problems,
                "lag_seconds": cycle.lag,
                "buried": cycle.buried,
            }
        )
        return
    columns = ["from", "flow", ">blocks", ">bytes", ">cost", "left out"]
    rows = []
    for report in cycle.flows:
        left = ", ".join(f"{number(t.blocks)} {reason.value}" for reason, t in report.plan.left_out.items())
        row = [
            report.source,
            report.flow.partition(" ")[2],
            number(len(report.plan.blocks)),
            human(report.plan.nbytes),
        ]
        rows.append([*row, f"{report.cost:.4f}", left or "-"])
        if done:
            rows[-1] += [", ".join(f"{number(n)} {o.value}" for o, n in report.copied.outcomes.items()) or "-"]
    print_table(columns + (["done"] if done else []), rows)
    for source, lag in cycle.lag.items():
        print(f"{source}: {'never level yet' if lag is None else f'{ago(lag)} behind'}")
    if cycle.buried:
        print(f"{number(cycle.buried)} blocks deleted because of tombstones")
    for source, problem in cycle.problems.items():
        note(f"{source}: {problem}")


def _flow_json(report: FlowReport, done: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "source": report.source,
        "flow": report.flow,
        "planned": {"blocks": len(report.plan.blocks), "bytes": report.plan.nbytes, "cost": report.cost},
        "left_out": {r.value: {"blocks": t.blocks, "bytes": t.nbytes} for r, t in report.plan.left_out.items()},
    }
    if done:
        outcomes = {outcome.value: count for outcome, count in report.copied.outcomes.items()}
        document["copied"] = {"bytes": report.copied.nbytes, "seconds": report.seconds, **outcomes}
    return document


def print_status(found: dict[str, Any]) -> None:
    """``found`` as ``replication.status`` makes it."""
    import time

    now = time.time()
    own = found["manifest"]
    if own:
        print(
            f"{found['region']} ({found['mode']}): manifest {own['sequence']} of {ago(now - own['published'])} ago, "
            f"{number(own['blocks'])} blocks, {human(own['bytes'])}"
        )
    else:
        print(f"{found['region']} ({found['mode']}): no manifest published")
    print_table(
        ("duty", "done by", ">last round", "last result", "problem"),
        [_duty(role, lease, found["duties"].get(role), now) for role, lease in found["leases"].items()],
        title="Duties",
    )
    print_table(
        ("source", ">sequence", ">behind", ">blocks", ">bytes", ">this month", ">cost", "problem"),
        [
            (
                source,
                str(row["sequence"]),
                ago(row["lag_seconds"]) if row["lag_seconds"] is not None else "never level",
                number(row["blocks"]),
                human(row["bytes"]),
                human(row["month_bytes"]),
                f"{row['month_cost']:.4f}",
                row["problem"] or "-",
            )
            for source, row in found["sources"].items()
        ],
        title="Sources",
    )


def _duty(role: str, lease: dict[str, Any], standing: dict[str, Any] | None, now: float) -> list[str]:
    """A row of the table of duties."""
    row = [role, lease["holder"] if lease["held"] else "nobody"]
    if standing is None:
        return [*row, "-", "-", "-"]
    did = f"{standing['did']}, {ago(now - standing['did_at'])} ago" if standing["did"] else "-"
    return [*row, f"{ago(now - standing['at'])} ago", did, standing["problem"] or "-"]


def show(json: bool, document: dict[str, Any], text: Callable[[], str]) -> None:
    """One result, for programs or for people."""
    if json:
        print_json(document)
    else:
        print(text())


def human(nbytes: int) -> str:
    from kvstore.units import human_bytes

    return human_bytes(nbytes)

"""What engines tell the node of themselves: how fast they compute and copy, and how long their answers were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from kvstore.demand import Demand
from kvstore.errors import ProtocolError
from kvstore.node.arguments import Arguments
from kvstore.node.protocol import split_keys
from kvstore.planning import Planning

if TYPE_CHECKING:
    from kvstore.node.verbs import Caller, Verb

MOST_ROWS = 4096
"""Of each kind in one report."""


def report_verbs(planning: Planning, demand: Demand) -> Mapping[str, Verb]:
    """The verbs by name. Called in the node's event loop."""

    def report(caller: Caller, args: Arguments) -> None:
        """Steps ``[tokens, pairs, seconds]``, loads ``[bytes, seconds]``, answers ``[keys, tokens]``; all of them optional."""
        steps = _rows(args, "steps", 3, _number)
        loads = _rows(args, "loads", 2, _number)
        answers = _rows(args, "answered", 2, lambda value: isinstance(value, bytes) or _number(value))
        if caller.namespace is not None:
            for tokens, pairs, seconds in steps:
                planning.step(caller.namespace, int(tokens), pairs, seconds)
            for nbytes, seconds in loads:
                planning.loaded(caller.namespace, int(nbytes), seconds)
        for keys, tokens in answers:
            demand.traffic.answered(split_keys(keys), int(tokens))

    def planner(caller: Caller, args: Arguments) -> Any:
        """The planner's mode, and what was learnt of tiers and engines."""
        return planning.describe()

    return {"report": report, "planner": planner}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value) and 0 <= value < 1e18


def _rows(args: Arguments, name: str, width: int, good: Callable[[object], bool]) -> list[Any]:
    rows = args.get(name, [])
    if (
        not isinstance(rows, list)
        or len(rows) > MOST_ROWS
        or not all(isinstance(row, list) and len(row) == width and all(map(good, row)) for row in rows)
    ):
        raise ProtocolError(f"{name} must be at most {MOST_ROWS} rows of {width} values that are not negative")
    return rows

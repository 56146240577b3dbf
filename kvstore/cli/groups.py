"""Options that commands share, as one parameter: a frozen dataclass whose fields are annotated as typer wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` for typer: in place of a parameter that is a dataclass stand its fields, and the command gets it built.

    Raises TypeError when two parameters have the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hints[name] for name in signature(command).parameters if is_dataclass(hints[name])}
    found = list(_parameters(command, hints))
    if len({one.name for one in found}) < len(found):
        raise TypeError(f"{command.__name__} has two options of one name")

    @wraps(command)
    def run(**given: Any) -> Any:
        built = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        return command(**built, **given)

    del run.__wrapped__  # typer would look at its parameters
    run.__signature__ = Signature(found)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in found}
    return run


def _parameters(command: Callable[..., Any], hints: dict[str, Any]) -> Iterator[Parameter]:
    for name, parameter in signature(command).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            yield parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=kind)
            continue
        inside = get_type_hints(kind, include_extras=True)
        for one in fields(kind):
            default = Parameter.empty if one.default is MISSING else one.default
            yield Parameter(one.name, Parameter.KEYWORD_ONLY, default=default, annotation=inside[one.name])

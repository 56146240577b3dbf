"""Waiting for threads and tasks that must not be left behind when the waiter is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def run(pool: Executor, function: Callable[..., T], *args: object) -> T:
    """Call ``function`` in a thread. A cancelled wait ends only when the call has, or will never start."""
    call = pool.submit(function, *args)
    outcome = asyncio.wrap_future(call)
    try:
        return await asyncio.shield(outcome)
    except asyncio.CancelledError:
        if not call.cancel():
            await _settle(outcome)
        raise


async def uninterrupted(task: asyncio.Task[T]) -> T:
    """Wait for a task. A cancelled wait ends only when the task has, which goes on."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _settle(task)
        raise


async def _settle(future: asyncio.Future[T]) -> None:
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()  # its waiter is gone: not worth a warning

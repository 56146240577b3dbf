"""Keeps a client connected, so that no engine thread ever waits for a connection or for a node to start."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvstore.errors import KVStoreError, NodeUnavailable
from kvstore.identity import BlockKey, Keyring, Namespace
from kvstore.node.api import NodeClient, Report

_Row = TypeVar("_Row")

logger = logging.getLogger("vllm.kvstore")

HEARTBEAT_SECONDS = 1.0

RETRY_SECONDS = 0.1
"""Between two tries to reach a node that does not answer: nothing is found until one of them succeeds."""

MOST_REPORTED = 256
"""Steps, loads and answers kept for the next heartbeat; older ones are dropped."""


class Link:
    """Opens the namespace as soon as a node answers, and again after one went away. Any thread may ask."""

    def __init__(
        self,
        client: NodeClient,
        namespace: Namespace,
        block_bytes: int,
        start_node: Callable[[], None] | None = None,
        states: tuple[Namespace, int] | None = None,
    ) -> None:
        """``start_node`` is called when no node answers; it need not wait for the node to be ready.

        ``states``: a second namespace and the bytes of its blocks, for what stands behind blocks of the first.
        """
        self.client = client
        self._namespace = namespace
        self._block_bytes = block_bytes
        self._states = states
        self._start_node = start_node
        self._keyring: Keyring | None = None
        self._state_keyring: Keyring | None = None
        self._on_node: Callable[[], None] | None = None
        self._on_gone: Callable[[], None] | None = None
        self._epoch = 0
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=MOST_REPORTED)
        self._loads: deque[tuple[int, float]] = deque(maxlen=MOST_REPORTED)
        self._answered: deque[tuple[Sequence[BlockKey], int]] = deque(maxlen=MOST_REPORTED)
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvstore-link", daemon=True)
        self._thread.start()

    @property
    def keyring(self) -> Keyring | None:
        """Makes the namespace's block keys; None while no node is known to answer, and then nobody asks it anything."""
        return self._keyring

    @property
    def state_keyring(self) -> Keyring | None:
        """Makes the keys of ``states``; not None where ``keyring`` is not."""
        return self._state_keyring

    def on_node(self, callback: Callable[[], None], gone: Callable[[], None] | None = None) -> None:
        """Call ``callback`` in the link's thread for every run of a node that is found, and ``gone`` each time that none answers.

        Who keeps a gone node's arena keeps its memory, and the next node may not have room for one of its own.
        """
        self._on_node, self._on_gone = callback, gone
        self._epoch = 0
        self._wake.set()

    def lost(self) -> None:
        """A call found the node gone, or had no answer in time. The engine waits for it no more until it has answered here."""
        self._keyring = None
        self._wake.set()

    def report_step(self, tokens: int, pairs: float, seconds: float) -> None:
        """See ``Report``; this and the next two only put it down for the link's thread to send."""
        self._steps.append((tokens, pairs, seconds))

    def report_load(self, nbytes: int, seconds: float) -> None:
        self._loads.append((nbytes, seconds))

    def report_answer(self, keys: Sequence[BlockKey], tokens: int) -> None:
        self._answered.append((keys, tokens))

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()
        self.client.close()

    def _run(self) -> None:
        silent = False
        while not self._closed:
            try:
                if self._states is not None:
                    self._state_keyring = self.client.open_namespace(*self._states)
                # The last one opened is what the node plans for and counts by.
                self._keyring = self.client.open_namespace(self._namespace, self._block_bytes)
                silent = False
                if self._on_node is not None and self.client.epoch != self._epoch:
                    self._epoch = self.client.epoch
                    self._on_node()
                self._report()
            except KVStoreError as error:
                self._keyring = None
                if not silent:
                    # The text: a record that somebody keeps would keep the error's stack, and with that the arena.
                    logger.warning("KV store: %s; requests are computed until a node answers", str(error))
                    silent = True
                if isinstance(error, NodeUnavailable):
                    self._forget()
                    self._start()
            except Exception:
                logger.exception("KV store: connecting failed")
            self._wake.wait(RETRY_SECONDS if self._keyring is None else HEARTBEAT_SECONDS)
            self._wake.clear()

    def _forget(self) -> None:
        """Tell that the node is gone, unless only the connection to it was lost."""
        if self._on_gone is None or self.client.epoch:
            return
        self._epoch = 0
        try:
            self._on_gone()
        except Exception:
            logger.exception("KV store: letting go of the memory of a node that is gone failed")

    def _report(self) -> None:
        report = Report(_drain(self._steps), _drain(self._loads), _drain(self._answered))
        if report.steps or report.loads or report.answered:
            self.client.report(report)

    def _start(self) -> None:
        if self._start_node is None:
            return
        try:
            self._start_node()
        except Exception as error:
            logger.warning("KV store: starting a node failed: %s", error)
            self._start_node = None


def _drain(rows: deque[_Row]) -> list[_Row]:
    """Take what is there now; others may append meanwhile."""
    return [rows.popleft() for _ in range(len(rows))]

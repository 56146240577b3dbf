"""Engines forked from a process that has imported vLLM already: a start takes two seconds of processor time, not nine.

For tests and studies. That process makes no engine itself and has one thread, so it may fork. One message over its socket starts
an engine: options and environment as JSON, and the engine's pipes and log as descriptors. It ends with its socket; its engines
end as others do, with their pipes.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from functools import cache
from typing import NoReturn

from connectors.vllm.process import serve

IMPORTED = ("vllm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "connectors.vllm.connector")
"""Most of what an engine on a CPU comes to import."""
MAX_MESSAGE = 128 << 10


class Forked:
    """The process of an engine, which is a child of another one. Has what ``EngineProcess`` needs of ``subprocess.Popen``."""

    def __init__(self, pid: int, descriptor: int) -> None:
        """``descriptor`` is the process's."""
        self.pid = pid
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    def wait(self, timeout: float | None = None) -> int | None:
        """Until it has ended; its status stays unknown. Raises TimeoutExpired after ``timeout`` seconds."""
        if not select.select([self._descriptor], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("engine", timeout or 0.0)
        return None

    def kill(self) -> None:
        """A process that has ended is left alone."""
        try:
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Preloaded:
    """Starts engines. One thread at a time may call."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """``environment`` is what libraries read when they are loaded, as the number of threads. Does not wait."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "connectors.vllm.preloaded", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def start(self, requests: int, answers: int, options: str, environment: Mapping[str, str], log: int) -> Forked:
        """Like ``connectors.vllm.process.spawn``. Waits until vLLM is imported. Raises RuntimeError if it cannot be."""
        message = json.dumps([options, dict(environment)]).encode()
        try:
            socket.send_fds(self._socket, [message], [requests, answers, log])
            pid, descriptors, _, _ = socket.recv_fds(self._socket, 64, 1)
        except OSError:
            pid = b""
        if not pid:
            raise RuntimeError(f"vLLM cannot be imported: status {self._process.wait()}")
        return Forked(int(pid), descriptors[0])

    def close(self) -> None:
        """Start no more; engines that run go on."""
        self._socket.close()
        self._process.wait()


@cache
def preloaded(environment: tuple[tuple[str, str], ...]) -> Preloaded:
    """One for each environment, until this process ends."""
    made = Preloaded(dict(environment))
    atexit.register(made.close)
    return made


def _fork_engines(control: socket.socket) -> None:
    """The process that has imported vLLM, until its socket ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for engines here
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE, 3)
        if not message:
            return
        pid = os.fork()
        if not pid:
            control.close()
            _become_engine(*json.loads(message), *descriptors)
        for each in descriptors:
            os.close(each)
        process = os.pidfd_open(pid)
        socket.send_fds(control, [str(pid).encode()], [process])
        os.close(process)


def _become_engine(options: str, environment: Mapping[str, str], requests: int, answers: int, log: int) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    status = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        serve(requests, answers, json.loads(options))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # nothing is left to do, and taking vLLM apart takes seconds


if __name__ == "__main__":
    _fork_engines(socket.socket(fileno=int(sys.argv[1])))

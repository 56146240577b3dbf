"""SGLang's virtual environment, and engines that run in it, for the tests beside this file."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def sglang_python() -> str:
    """The interpreter of SGLang's environment; skips the test when there is none."""
    python = os.environ.get("KVSTORE_SGLANG_PYTHON", str(ROOT / ".venv-sglang" / "bin" / "python"))
    if not Path(python).exists():
        pytest.skip(f"SGLang is not installed ({python}): run .ci/install-sglang")
    return python


def environment(**more: str) -> dict[str, str]:
    """Environment of SGLang's processes on a CPU."""
    path = os.pathsep.join(map(str, [HERE / "sglang_site", ROOT, ROOT / "tests" / "connectors"]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one prompt."""

    tokens: list[int]
    logprobs: list[float]
    stored: int
    """Prompt tokens whose KV came from storage."""
    cached: int
    """Prompt tokens that were not computed."""
    request: str
    """SGLang's id of the request."""


class Engine:
    """An SGLang engine in a process of its own; a context manager. ``store`` are our settings, None for no storage."""

    def __init__(
        self, model: Path, store: Mapping[str, Any] | None, arguments: Mapping[str, Any], log: Path, **variables: str
    ) -> None:
        requests, write = os.pipe()
        read, answers = os.pipe()
        options = {"model_path": str(model), **arguments}
        if store is not None:
            options |= {"hicache_storage_backend": "dynamic", "hicache_storage_backend_extra_config": backend(store)}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sglang_python(), str(HERE / "sglang" / "engine.py"), str(requests), str(answers), json.dumps(options)],
                pass_fds=(requests, answers),
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        os.close(requests)
        os.close(answers)
        self._requests, self._answers = os.fdopen(write, "w"), os.fdopen(read)

    def __enter__(self) -> Self:
        return self

    def hang_up(self) -> None:
        """Let the engine end; leaving the context waits for it."""
        self._requests.close()

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int = 12) -> list[Answer]:
        """Greedy completions of all prompts as one batch."""
        return [Answer(**answer) for answer in self.call("generate", {"prompts": prompts, "tokens": tokens})]

    def call(self, verb: str, argument: Any = None) -> Any:
        """Any of the verbs of ``sglang/engine.py``."""
        try:
            print(json.dumps([verb, argument]), file=self._requests, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the engine's process ended with status {self._process.wait()}")
        return json.loads(line)


def backend(settings: Mapping[str, Any]) -> str:
    """SGLang's ``--hicache-storage-backend-extra-config`` for our backend."""
    return json.dumps(
        {
            "backend_name": "kvstore",
            "module_path": "connectors.sglang",
            "class_name": "KVStoreStorage",
            "interface_v1": 1,
            "hicache_storage_pass_prefix_keys": True,
            **settings,
        }
    )

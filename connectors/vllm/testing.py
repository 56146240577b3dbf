"""vLLM engines on a CPU for tests, demos and studies: the same prompt gives the same tokens, computed or loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectors.vllm.preloaded import preloaded
from connectors.vllm.process import OFFLINE, EngineProcess

EXACT = {"dtype": "float32", "enforce_eager": True, "seed": 0, "max_num_seqs": 8, "block_size": 32}
"""In bfloat16 not even vLLM's own prefix cache gives the tokens of computing everything."""
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
_LOADED = "vllm:kvstore_tokens_loaded{"


PATIENT = {"lookup_timeout_s": 2.0}
"""Where more runs than there are cores, as when tests run, an answer may take longer than an engine should wait."""


@contextmanager
def cpu_engine(
    model: Path,
    log: Path,
    socket: Path | None = None,
    threads: int = 0,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Iterator[EngineProcess]:
    """An engine that is starting (``ready()`` waits), with the store whose node listens on ``socket``, or without one.

    ``threads`` compute; 0 leaves the number to vLLM. ``options`` are more of the connector's settings. ``arguments`` go to
    ``vllm.LLM``, over ``EXACT``. An engine that dies raises RuntimeError with the end of its log.
    """
    store = {"socket": str(socket), "autostart": False, **PATIENT, **(options or {})} if socket else None
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)} if threads else {}
    environment = {**_ENVIRONMENT, **bound}
    start = preloaded(tuple((OFFLINE | environment).items())).start
    with log.open("ab") as out:
        process = EngineProcess(str(model), store, {**EXACT, **arguments}, environment, out.fileno(), start)
    with process:
        try:
            yield process
        except RuntimeError as error:
            raise RuntimeError(f"{error}; the end of {log.name}:\n{log.read_text(errors='replace')[-3000:]}") from error


@dataclass(frozen=True, slots=True)
class Reply:
    """What an engine made of one prompt."""

    tokens: list[int]
    prompt_tokens: int
    ttft_seconds: float
    loaded: dict[str, int]
    """Prompt tokens that came from the store, by tier; tiers that gave none are left out."""


def ask(engine: EngineProcess, prompt: str, max_tokens: int = 8) -> Reply:
    """Ask once, with vLLM's own prefix cache empty: what is not computed comes from the store."""
    engine.forget()
    before = engine.counters()
    (answer,) = engine.generate([prompt], max_tokens)
    gained = {
        name.removeprefix(_LOADED).rstrip("}"): int(value - before.get(name, 0))
        for name, value in engine.counters().items()
        if name.startswith(_LOADED)
    }
    loaded = {tier: tokens for tier, tokens in gained.items() if tokens}
    return Reply(answer.tokens, answer.prompt_tokens, answer.ttft_seconds, loaded)

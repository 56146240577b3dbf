"""A vLLM engine in a process of its own, driven prompt by prompt from this one: for demos, tests and studies.

The child reads one JSON request a line and answers with one JSON line, over pipes that vLLM's own output cannot reach.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one prompt."""

    tokens: list[int]
    text: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were not computed, as vLLM counts them: its own prefix cache and ours."""
    ttft_seconds: float
    finish_reason: str | None


class Process(Protocol):
    """What is needed of ``subprocess.Popen``."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> int | None: ...

    def kill(self) -> None: ...


Start = Callable[[int, int, str, Mapping[str, str], int], Process]
"""Starts the child, with the descriptors of its pipes (requests, answers), vLLM's options as JSON, its environment, its log."""


def spawn(requests: int, answers: int, options: str, environment: Mapping[str, str], log: int) -> Process:
    """A new interpreter."""
    return subprocess.Popen(
        [sys.executable, "-m", "connectors.vllm.process", str(requests), str(answers), options],
        pass_fds=(requests, answers),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )


class EngineProcess:
    """Context manager. Not thread-safe.

    ``arguments`` go to ``vllm.LLM``; ``kv_connector`` is the connector's extra config, or None for an engine without it.
    """

    def __init__(
        self,
        model: str,
        kv_connector: Mapping[str, Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        log: int | None = None,
        start: Start = spawn,
    ) -> None:
        """``log`` is a descriptor for the engine's output; None drops it."""
        requests, self._write = os.pipe()
        self._read, answers = os.pipe()
        options = {"model": model, **(arguments or {})}
        if kv_connector is not None:
            options["kv_transfer_config"] = transfer_config(kv_connector)
        environment = {**os.environ, **OFFLINE, **(environment or {})}
        with open(os.devnull, "wb") as nowhere:
            out = nowhere.fileno() if log is None else log
            self._process = start(requests, answers, json.dumps(options), environment, out)
        os.close(requests)
        os.close(answers)
        self._requests = os.fdopen(self._write, "w")
        self._answers = os.fdopen(self._read)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the engine's process so far, all threads."""
        with open(f"/proc/{self._process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ready(self) -> None:
        """Wait until the engine is up. Raises RuntimeError if it never will be."""
        self._call({"ready": True})

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_tokens: int = 16,
        salts: Sequence[str | None] | None = None,
    ) -> list[Answer]:
        """Greedy completions of all prompts (text, or token ids) as one batch, in their order."""
        request = {"prompts": list(prompts), "max_tokens": max_tokens, "salts": list(salts or [])}
        return [Answer(**answer) for answer in self._call(request)]

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        self._call({"forget": True})

    def counters(self) -> dict[str, float]:
        """vLLM's counters by name, with other labels than the engine's as ``name{value}``."""
        counters: dict[str, float] = self._call({"counters": True})
        return counters

    def close(self) -> None:
        """End the engine and wait for its process."""
        self._requests.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _call(self, request: Mapping[str, Any]) -> Any:
        try:
            print(json.dumps(request), file=self._requests, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the engine's process ended with status {self._process.wait()}")
        return json.loads(line)


def transfer_config(extra: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's ``--kv-transfer-config`` for our connector."""
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(extra),
    }


def serve(requests: int, answers: int, options: dict[str, Any]) -> None:
    """The child: one engine, until its standard input ends."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm: Any = LLM(**{"disable_log_stats": False, **options})
    has_tokenizer = not options.get("skip_tokenizer_init", False)

    def token_ids(prompt: str | list[int]) -> list[int]:
        ids: list[int] = llm.get_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
        return ids

    def generate(request: dict[str, Any]) -> list[dict[str, Any]]:
        salts = request["salts"] or [None] * len(request["prompts"])
        prompts = [
            TokensPrompt(prompt_token_ids=token_ids(prompt), **({"cache_salt": salt} if salt else {}))
            for prompt, salt in zip(request["prompts"], salts, strict=True)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=has_tokenizer
        )
        return [asdict(_answer(output)) for output in llm.generate(prompts, sampling, use_tqdm=False)]

    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            request = json.loads(line)
            result: Any = None
            if "prompts" in request:
                result = generate(request)
            elif "counters" in request:
                result = _counters(llm)
            elif "forget" in request:
                result = llm.reset_prefix_cache()
            print(json.dumps(result), file=out, flush=True)
    llm.llm_engine.engine_core.shutdown()


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    return Answer(
        list(completion.token_ids),
        completion.text,
        len(output.prompt_token_ids),
        output.num_cached_tokens or 0,
        output.metrics.first_token_latency if output.metrics else 0.0,
        completion.finish_reason,
    )


def _counters(llm: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            labels = [value for name, value in sorted(metric.labels.items()) if name not in ("model_name", "engine")]
            name = metric.name + (f"{{{','.join(labels)}}}" if labels else "")
            found[name] = found.get(name, 0) + metric.value
    return found


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))

"""A real SGLang engine on a CPU, driven by JSON lines; runs in SGLang's own virtual environment.

usage: engine.py REQUESTS_FD ANSWERS_FD '{"model_path": ..., other arguments of sglang.Engine}'
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

CPU = {
    "skip_tokenizer_init": True, "device": "cpu", "dtype": "float32", "attention_backend": "torch_native",
    "sampling_backend": "pytorch", "grammar_backend": "none", "disable_cuda_graph": True, "disable_overlap_schedule": True,
    "page_size": 64, "max_total_tokens": 4096, "max_running_requests": 4, "mem_fraction_static": 0.3,
    "context_length": 2048, "log_level": "info", "random_seed": 1, "enable_cache_report": True, "enable_metrics": True,
    "enable_hierarchical_cache": True, "hicache_ratio": 2.0, "hicache_io_backend": "direct",
    "hicache_mem_layout": "page_first_direct", "hicache_write_policy": "write_through",
    "hicache_storage_prefetch_policy": "wait_complete",
}  # fmt: skip


def main() -> None:
    requests, answers, options = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(**{**CPU, **options})
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            verb, argument = json.loads(line)
            print(json.dumps(VERBS[verb](engine, argument)), file=out, flush=True)
    engine.shutdown()


def generate(engine: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": request["tokens"], "ignore_eos": True}
    outputs = engine.generate(
        input_ids=request["prompts"], return_logprob=True, sampling_params=[sampling] * len(request["prompts"])
    )
    return [
        {
            "tokens": output["output_ids"],
            "logprobs": [round(entry[0], 4) for entry in output["meta_info"]["output_token_logprobs"]],
            "stored": (output["meta_info"].get("cached_tokens_details") or {}).get("storage", 0),
            "cached": output["meta_info"]["cached_tokens"],
            "request": output["meta_info"]["id"],
        }
        for output in outputs
    ]


def flush(engine: Any, _: Any) -> bool:
    """Empty the device and host tiers."""
    return bool(engine.flush_cache().success)


def clear(engine: Any, _: Any) -> bool:
    """Empty the storage."""
    return bool(engine.loop.run_until_complete(engine.tokenizer_manager.clear_hicache_storage()).success)


def attach(engine: Any, options: dict[str, str]) -> list[Any]:
    answer = engine.loop.run_until_complete(engine.tokenizer_manager.attach_hicache_storage(**options))
    return [answer.success, answer.message]


def detach(engine: Any, _: Any) -> list[Any]:
    answer = engine.loop.run_until_complete(engine.tokenizer_manager.detach_hicache_storage())
    return [answer.success, answer.message]


def counters(engine: Any, _: Any) -> dict[str, float]:
    """SGLang's and our counters, ranks added up, as ``name{label}`` where the label is one of ours."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    found: dict[str, float] = {}
    for metric in registry.collect():
        for sample in metric.samples:
            label = sample.labels.get("reason") or sample.labels.get("pool")
            name = f"{sample.name}{{{label}}}" if label else sample.name
            found[name] = found.get(name, 0) + sample.value
    return found


def version(engine: Any, _: Any) -> str:
    """Of SGLang."""
    from sglang import __version__

    return str(__version__)


VERBS = {
    "generate": generate, "flush": flush, "clear": clear, "attach": attach, "detach": detach, "counters": counters,
    "version": version,
}  # fmt: skip

if __name__ == "__main__":
    main()

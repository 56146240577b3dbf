"""One vLLM engine in a process of its own: a JSON list of prompts comes in per line, a list of answers goes out.

vLLM's own prefix cache is emptied before every prompt, so that what is not computed comes from the store.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

NEW_TOKENS = 8
LOADED = "vllm:kvstore_tokens_loaded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", help="the node's; without it the engine has no store")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is log

    from vllm import LLM

    store = {}
    if args.socket:
        store["kv_transfer_config"] = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": args.socket, "autostart": False},
        }
    # float32: in bfloat16 not even vLLM's own prefix cache gives the same tokens as computing everything.
    llm = LLM(
        model=args.model, dtype="float32", enforce_eager=True, max_model_len=8192, max_num_batched_tokens=8192,
        max_num_seqs=4, block_size=32, seed=0, disable_log_stats=False, **store,
    )  # fmt: skip
    ask(llm, "Warm up.")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps([ask(llm, prompt) for prompt in json.loads(line)]), file=answers, flush=True)


def ask(llm: Any, prompt: str) -> dict[str, Any]:
    """Answer greedily; also say how long the first token took and how much of the prompt was loaded, by tier."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    before = loaded(llm)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    (output,) = llm.generate([prompt], sampling, use_tqdm=False)
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "tokens": list(output.outputs[0].token_ids),
        "ttft_s": output.metrics.first_token_latency,
        "loaded": {medium: int(count - before.get(medium, 0)) for medium, count in loaded(llm).items()},
    }


def loaded(llm: Any) -> dict[str, float]:
    """Tokens loaded from the store since the start, by tier, as vLLM's own metrics have them."""
    return {m.labels["medium"]: m.value for m in llm.get_metrics() if m.name == LOADED and m.value}


if __name__ == "__main__":
    main()

"""Time to the first token in real vLLM: computed, from the GPU's prefix cache, and from the store's tiers.

The geometry of Llama-3-8B with made-up weights, one request at a time and eight at once, FlashAttention. Two engines are
measured in interleaved rounds on one GPU: one with the store, one with vLLM's own CPU offloading. Then the first is replaced by
a new one, the node is restarted, so that its blocks come from disk, and last a node without that disk takes them from the
bucket. Time is vLLM's own: from a request's arrival to its first token.

The physical limit of a hit in host memory is the time of a hit in the GPU's own prefix cache plus that of one pinned copy of
the same bytes.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.study import Study
from kvstore.errors import KVStoreError
from kvstore.node.client import Client

LENGTHS = (1024, 4096, 8192, 16384, 32768)
ROUNDS = 2
"""Fresh prompts of every length; all of them fit into host memory."""
HITS = 4
"""Of each prompt in each round."""
CROWD = 8
"""Requests at once, of CROWD_TOKENS each; the mean of their times counts."""
CROWD_TOKENS = 4096
KV_BYTES = 128 << 10
"""Per token."""
BLOCK_TOKENS = 64
WARM_TOKENS = 4096
COPY_BYTES = 1 << 30

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENGINE = {
    "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16", "seed": 0, "enforce_eager": True,
    "max_model_len": 33024, "max_num_batched_tokens": 8192, "max_num_seqs": 8, "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 9 << 30, "attention_config": {"backend": "FLASH_ATTN"},
    "compilation_config": {"custom_ops": ["all"]},
}  # fmt: skip
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
OFFLOADING = {
    "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 22 << 30},
}  # fmt: skip
NODE = {
    "host.bytes": "24GiB", "disk.bytes": "24GiB", "policy.planner": "off", "policy.prefetch": "wait_complete"
}  # fmt: skip
PIN_SECONDS = 15.0
"""To register such an arena with CUDA; hits are fast from then on."""
SETTLE_SECONDS = 0.3
"""For vLLM's offloading, which does not say when it has stored."""


class Site:
    """A node and engines on this machine."""

    def __init__(self, directory: Path, bucket: str, log: int) -> None:
        self.directory = directory
        self.bucket = bucket
        self.socket = directory / "node.sock"
        self.model = directory / "llama-8b"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(CONFIG))
        self._log = log

    @contextmanager
    def node(self, data: str = "data", disk: bool = True) -> Iterator[None]:
        """A node over the files in ``data``; without ``disk``, the bucket is all it has."""
        settings = {"node.directory": self.directory / data, "node.socket": self.socket, "object.url": self.bucket}
        settings |= {**NODE, "disk.enabled": str(disk).lower()}
        command = [sys.executable, "-m", "kvstore", "node", *(f"--set={k}={v}" for k, v in settings.items())]
        process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        try:
            until("the node answers", lambda: process.poll() is not None or bool(self.status()), 90)
            if process.poll() is not None:
                raise SystemExit(f"the node ended with status {process.returncode}: see --log")
            yield
        finally:
            process.terminate()
            process.wait()

    def engine(self, transfer: Mapping[str, Any] | None = None) -> Any:
        """An engine with the store, or with another connector's configuration; not ready yet."""
        from connectors.vllm.process import EngineProcess, transfer_config

        store = {"socket": str(self.socket), "autostart": False, "model": "llama-8b", "weights": "dummy"}
        arguments = {**ENGINE, "kv_transfer_config": transfer or transfer_config(store)}
        return EngineProcess(str(self.model), None, arguments, ENVIRONMENT, self._log)

    def status(self) -> Any:
        try:
            with Client(self.socket, name="study") as client:
                return client.call("status")
        except KVStoreError:
            return None

    def blocks(self, medium: str) -> int:
        return sum(tier["blocks"] for tier in self.status()["tiers"] if tier["medium"] == medium)

    def linked(self) -> bool:
        """Whether both sides of an engine have found the node."""
        return sum(client["namespace"] is not None for client in self.status()["clients"]) == 2

    def saved(self, tokens: int) -> None:
        """Wait until host memory, disk and bucket hold ``tokens``."""
        blocks = tokens // BLOCK_TOKENS
        until("prompts are saved", lambda: min(map(self.blocks, ("host", "disk", "object"))) >= blocks)


def until(what: str, condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait. When it takes too long, say so and go on: the samples will show it."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            print(f"not within {seconds:g} s: {what}", file=sys.stderr, flush=True)
            return
        time.sleep(0.02)


class Samples:
    """Milliseconds to the first token by kind and length; printed, and kept in a file, as they come."""

    def __init__(self, path: Path | None) -> None:
        self._samples: dict[str, dict[int, list[float]]] = {}
        self._path = path

    def add(self, kind: str, engine: Any, prompt: Sequence[int]) -> None:
        """One request. What was to be a hit and is none, or the reverse, is told and left out."""
        self.add_crowd(kind, engine, [prompt])

    def add_crowd(self, kind: str, engine: Any, prompts: Sequence[Sequence[int]]) -> None:
        """Requests of one length that arrive together; the sample is their mean."""
        answers = engine.generate(prompts, max_tokens=1)
        length, found = len(prompts[0]), [answer.cached_tokens for answer in answers]
        ms = statistics.mean(answer.ttft_seconds for answer in answers) * 1e3
        line = f"{kind} {length}: {ms:.1f} ms, {found} tokens cached"
        if any(found) if "computed" in kind else min(found) < length - BLOCK_TOKENS:
            print(f"{line}: left out", file=sys.stderr, flush=True)
            return
        print(line, file=sys.stderr, flush=True)
        self._samples.setdefault(kind, {}).setdefault(length, []).append(round(ms, 2))
        if self._path is not None:
            self._path.write_text(json.dumps(self._samples, indent=1))

    def medians(self, kind: str) -> dict[int, float]:
        return {length: statistics.median(values) for length, values in self._samples.get(kind, {}).items()}

    def kinds(self) -> list[str]:
        return list(self._samples)


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed * 1_000_003 + length).choices(range(5, 31_000), k=length)


def warm_up(engine: Any, seed: int) -> None:
    """Compile and touch what the first requests of an engine would pay for."""
    tokens = prompt(WARM_TOKENS, seed)
    for _ in range(4):
        engine.generate([tokens], max_tokens=1)
        time.sleep(SETTLE_SECONDS)
        engine.forget()


def bus_gbps() -> float:
    """One pinned copy to the GPU."""
    from benchmarks.gpu import Memcpy, timed

    memcpy = Memcpy(COPY_BYTES)
    gbps = statistics.median(timed(lambda: memcpy.back(COPY_BYTES), COPY_BYTES) for _ in range(9))
    print(f"pinned copy to the GPU: {gbps:.1f} GB/s", file=sys.stderr, flush=True)
    return gbps


def started(engine: Any) -> Any | None:
    """The engine when it is ready; None when it does not start."""
    try:
        engine.ready()
    except RuntimeError as error:
        print(f"vLLM's own offloading is not measured: {error}", file=sys.stderr, flush=True)
        return None
    return engine


def side_by_side(site: Site, samples: Samples, ours: Any, theirs: Any | None) -> None:
    """Computed, then hits in host memory and in the GPU's prefix cache, of both engines in turn."""
    saved = WARM_TOKENS
    for seed in range(ROUNDS):
        for length in LENGTHS:
            tokens = prompt(length, seed)
            samples.add("computed", ours, tokens)
            saved += length
            site.saved(saved)
            if theirs is not None:
                samples.add("vllm_native_computed", theirs, tokens)
                time.sleep(SETTLE_SECONDS)
                samples.add("vllm_native_gpu_hit", theirs, tokens)
                time.sleep(SETTLE_SECONDS)
            for _ in range(HITS):
                ours.forget()
                samples.add("host", ours, tokens)
                samples.add("gpu_hit", ours, tokens)
                if theirs is not None:
                    theirs.forget()
                    samples.add("vllm_native_host", theirs, tokens)
                    samples.add("vllm_native_gpu_hit", theirs, tokens)


def crowd() -> list[list[int]]:
    return [prompt(CROWD_TOKENS, 1000 + number) for number in range(CROWD)]


def crowds(site: Site, samples: Samples, ours: Any, theirs: Any | None) -> None:
    """Eight requests at once: computed, then hits, of both engines in turn."""
    prompts = crowd()
    samples.add_crowd("crowd_computed", ours, prompts)
    site.saved(WARM_TOKENS + ROUNDS * sum(LENGTHS) + CROWD * CROWD_TOKENS)
    if theirs is not None:
        samples.add_crowd("crowd_vllm_native_computed", theirs, prompts)
        time.sleep(SETTLE_SECONDS)
    for _ in range(HITS):
        ours.forget()
        samples.add_crowd("crowd_host", ours, prompts)
        samples.add_crowd("crowd_gpu_hit", ours, prompts)
        if theirs is not None:
            theirs.forget()
            samples.add_crowd("crowd_vllm_native_host", theirs, prompts)


def every_prompt(samples: Samples, kind: str, engine: Any) -> None:
    """Each stored prompt once: what an engine that never saw it, or a node that has it on disk only, answers in."""
    for seed in range(ROUNDS):
        for length in LENGTHS:
            engine.forget()
            samples.add(kind, engine, prompt(length, seed))


def tell_counters(engine: Any) -> None:
    counters = {name: value for name, value in engine.counters().items() if "kvstore" in name}
    print(json.dumps(counters, indent=1), file=sys.stderr, flush=True)


def measure(site: Site, samples: Samples, native: bool) -> float:
    """Take all samples; returns the bandwidth of the bus in GB/s."""
    with ExitStack() as run:
        with site.node(), ExitStack() as engines:
            ours = engines.enter_context(site.engine())
            theirs = engines.enter_context(site.engine(OFFLOADING)) if native else None
            ours.ready()
            until("the engine found the node", site.linked)
            warm_up(ours, -1)
            theirs = started(theirs) if theirs is not None else None
            if theirs is not None:
                warm_up(theirs, -1)
            time.sleep(PIN_SECONDS)
            gbps = bus_gbps()
            side_by_side(site, samples, ours, theirs)
            crowds(site, samples, ours, theirs)
            tell_counters(ours)
            engines.close()

            restarted = run.enter_context(site.engine())
            restarted.ready()
            until("the new engine found the node", site.linked)
            warm_up(restarted, -2)
            time.sleep(PIN_SECONDS)
            every_prompt(samples, "restarted", restarted)
            site.saved(2 * WARM_TOKENS + ROUNDS * sum(LENGTHS) + CROWD * CROWD_TOKENS)
        with site.node():
            until("the engine found the new node", site.linked)
            time.sleep(PIN_SECONDS)
            every_prompt(samples, "disk", restarted)
        with site.node("fresh", disk=False):
            until("the engine found the node without a disk", site.linked)
            until("the bucket is listed", lambda: site.blocks("object") >= ROUNDS * sum(LENGTHS) // BLOCK_TOKENS)
            time.sleep(PIN_SECONDS)
            every_prompt(samples, "object", restarted)
            tell_counters(restarted)
            restarted.close()
    return gbps


def run(args: Any) -> Mapping[str, float]:
    samples = Samples(args.samples)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        log = os.open(args.log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            bucket = args.bucket or f"file://{Path(directory).resolve()}/bucket"
            gbps = measure(Site(Path(directory), bucket, log), samples, args.native)
        finally:
            os.close(log)
    return figures(samples, gbps)


def figures(samples: Samples, gbps: float) -> dict[str, float]:
    """The worst ratios over the lengths (of prompts that are computed the median, of few samples), and the medians."""
    medians = {kind: samples.medians(kind) for kind in samples.kinds()}
    limit = {n: floor + n * KV_BYTES / gbps / 1e6 for n, floor in medians["gpu_hit"].items()}
    ratios = {
        "host_ratio_to_physics": worst(medians["host"], limit),
        "restarted_ratio_to_physics": worst(medians["restarted"], limit),
        "disk_ratio_to_computed": worst(medians["disk"], medians["computed"]),
        "object_ratio_to_computed": worst(medians["object"], medians["computed"]),
        "crowd_host_ratio_to_computed": worst(medians["crowd_host"], medians["crowd_computed"]),
    }
    if "vllm_native_host" in medians:
        ratios["host_ratio_to_vllm_native"] = worst(medians["host"], medians["vllm_native_host"])
        pairs = [(ms, medians["vllm_native_computed"][n]) for n, ms in medians["computed"].items()]
        ratios["computed_ratio_to_vllm_native"] = statistics.median(ours / theirs for ours, theirs in pairs)
    if "crowd_vllm_native_host" in medians:
        ratios["crowd_ratio_to_vllm_native"] = worst(medians["crowd_host"], medians["crowd_vllm_native_host"])
    longest = max(LENGTHS)
    ratios["host_speedup_of_longest"] = medians["computed"][longest] / medians["host"][longest]
    times = {f"{kind}_ms_{n}": value for kind, values in medians.items() for n, value in values.items()}
    saved = {n: medians["computed"][n] - floor for n, floor in medians["gpu_hit"].items()}
    break_even = {f"break_even_gbps_{n}": n * KV_BYTES / ms / 1e6 for n, ms in saved.items() if ms > 0}
    return {**ratios, "pinned_copy_gbps": gbps, **break_even, **times}


def worst(ours: Mapping[int, float], others: Mapping[int, float]) -> float:
    return max(ours[length] / others[length] for length in ours if length in others)


def arguments(parser: Any) -> None:
    parser.add_argument("--directory", type=Path, help="folder on a local disk with 24 GiB free")
    parser.add_argument(
        "--bucket", default="", help="object.url of the node, 21 GiB; a folder in --directory if not given"
    )
    parser.add_argument("--samples", type=Path, help="keep every sample in this file as it comes")
    parser.add_argument("--log", type=Path, help="keep the output of engines and node in this file")
    parser.add_argument(
        "--no-native", dest="native", action="store_false", help="without vLLM's own offloading beside it"
    )


STUDY = Study(
    name="ttft",
    summary="Time to the first token in vLLM, 8B geometry, 1k to 32k tokens: worst length against the physical limit",
    run=run,
    targets={"host_ratio_to_physics": "<=1.15", "host_ratio_to_vllm_native": "<=1.05"},
    arguments=arguments,
)

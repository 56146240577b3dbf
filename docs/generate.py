"""Rewrites the generated parts of the user documentation: ``make docs``.

The table of settings comes from the configuration object, the command reference from the command line's own help, the
README's measurements from benchmarks/results/.
A test holds the files to what this prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from benchmarks.study import judge
from kvstore.cli import app
from kvstore.config import fields, load

DOCS = Path(__file__).parent
SHARED = {"config", "overrides", "socket", "json"}
"""Options described once, in the text of cli.md."""


def settings() -> str:
    """One table per section."""
    loaded = load(environ={"XDG_RUNTIME_DIR": "$XDG_RUNTIME_DIR"})
    defaults = {setting.name: setting.value for setting in loaded.settings()}
    # These two depend on who asks.
    defaults["node.socket"] = "$XDG_RUNTIME_DIR/kvstore/node.sock, or /tmp/kvstore-UID/node.sock"
    defaults["node.directory"] = "/var/lib/kvstore for root, else ~/.cache/kvstore"
    out = []
    section = None
    for name, part, _, description in fields():
        if part != section:
            section = part
            out += ["", f"## `[{part}]`", "", "| key | default | what it is |", "|---|---|---|"]
        out.append(f"| `{name}` | {defaults[name] or '(empty)'} | {description} |")
    return "\n".join(out).strip()


def commands() -> str:
    """Arguments and options of every command; those that all share stand in the text before."""
    parts = []
    for name, command in _commands("kvstore", typer.main.get_command(app)):
        own = [f"| `{_usage(p)}` | {p.help} |" for p in command.params if p.name not in SHARED]
        table = "\n".join(("| | |", "|---|---|", *own)) if own else ""
        parts += [f"## `{name}`", command.help, table]
    return "\n\n".join(part for part in parts if part)


def _commands(name: str, group: Any) -> Iterator[tuple[str, Any]]:
    """Every command by its whole name; a group comes before its commands."""
    for part, command in group.commands.items():
        yield f"{name} {part}", command
        if hasattr(command, "commands"):
            yield from _commands(f"{name} {part}", command)


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    return ", ".join(parameter.opts) + value


MEASURED = {
    "hashing": {"ms_128k_tokens": "block keys of a 128k-token prompt, ms"},
    "node": {
        "lookup_2048_us": "lookup of a 2,048-block chain through the node's socket, µs",
        "save_ratio_to_memcpy": "saving 8 MiB blocks, share of memcpy's speed",
        "load_ratio_to_memcpy": "loading 8 MiB blocks from host memory, share of memcpy's speed",
        "node_heap_mb_1m_blocks": "memory of a node with a million blocks indexed, MB",
        "turns_while_mapping": "an engine's thread while the arena of a restarted node is mapped, turns against alone",
        "lookup_512_ms_beside_writes": "lookup of 512 blocks while two processors write saves to disk and bucket, ms, median",
    },
    "planner": {
        "worst_ratio_to_best": "planner, first token against the better of load-all and recompute-all, worst of 720 cases",
        "within_1.05": "... share of the cases within 1.05",
        "worst_ratio_one_stream": "... worst of 5,760 single streams of 40 requests",
    },
    "overhead": {"slowdown": "vLLM with the connector and no hit at all, times vLLM without it"},
    "disk": {
        "write_ratio_to_fio": "disk tier, writing with checksum, journal and sync, share of fio without",
        "read_ratio_to_fio": "disk tier, reading with verification, share of fio",
    },
    "object": {
        "put_ratio_to_raw": "object tier, PUT, share of the fastest raw client",
        "get_ratio_to_raw": "object tier, verified GET, share of the fastest raw client",
        "encrypted_write_ratio": "... writing encrypted, share of its speed without",
        "encrypted_read_ratio": "... reading encrypted, share of its speed without",
    },
    "slowtier": {
        "ratio_worst": "first token of a real vLLM over a disk slower than computing, times computing, at worst"
    },
    "catalog": {
        "lookup_500_ms": "lookup of 500 blocks in a Redis catalog of a million, ms",
        "visible_ms": "from durable on one node to listed on another, ms",
    },
    "replication": {
        "link_utilisation_50ms": "replication over a link of 50 ms, share of the link",
        "convergence_seconds_after_cut": "replication after a cut of 5 s, seconds beyond it",
    },
    "wan": {
        "wan_efficiency_gain": "bytes over the WAN, sent ahead or read on demand, for 80% of the benefit of sending everything, "
        "times fewer (MLA 671B, 25 Gbit/s)",
        "wan_efficiency_gain_sent_ahead": "... sent ahead only",
        "wan_efficiency_gain_10_gbit": "... over 10 Gbit/s, with reads",
        "wan_efficiency_gain_8b": "... of an 8B with grouped queries, with reads",
    },
    "warmup": {
        "worst_gain_over_count_points": "a new cluster, hit points over selection by count at equal bytes, worst of nine points "
        "(bytes divided as docs/regions.md advises; MLA 671B, 25 Gbit/s)",
        "worst_gain_over_count_points_sent_ahead": "... all sent ahead",
        "first_minute_hit_at_2677_blocks": "a new cluster on a budget of 2,677 blocks, hits in its first minute, percent",
        "first_minute_hit_at_23414_blocks": "... with 23,414 blocks (cold: 4.8, everything: 28.9)",
    },
    "traces": {
        "worst_deficit_points": "eviction on three traces, points behind the best other policy at worst",
        "mean_belady_gap_closed": "eviction on three traces, share of the gap from LRU to Belady closed",
        "disk_write_ratio": "admission, disk bytes written, share of writing everything",
        "hits_lost_percent": "admission, hits lost by that, percent",
    },
    "gpu": {
        "offload_ratio_to_memcpy": "GPU to arena, worst of four geometries, share of pinned memcpy",
        "reload_ratio_to_memcpy": "arena to GPU, worst of four geometries, share of pinned memcpy",
        "decode_slowdown": "a decode loop (CUDA graphs, as in vLLM) beside saves at the 20 GB/s that they take, times alone",
        "decode_eager_slowdown": "... eager",
        "prefill_slowdown": "a prefill beside saves as fast as they go, times alone",
    },
    "gpus": {
        "offload_ratio_to_memcpy": "two GPUs to one arena at once, share of both memcpys",
        "reload_ratio_to_memcpy": "one arena to two GPUs at once, share of both memcpys",
    },
    "ttft": {
        "host_ratio_to_physics": "first token with vLLM on an H100, from host memory, times what the link allows, at worst",
        "host_ratio_to_vllm_native": "... times vLLM's own offloading to host memory",
        "computed_ratio_to_vllm_native": "... of a prompt that is computed and saved, times with vLLM's own offloading",
    },
    "vllmtier": {
        "load_ratio_to_vllm_fs": "vLLM's own offloading loading from this store's memory, times its own file tier",
        "disk_load_ratio_to_vllm_fs": "... from its disk, verified",
    },
    "lmcache": {
        "store_ratio_to_lmcache_fs": "LMCache storing over this store, times its own file backend",
        "load_ratio_to_lmcache_fs": "LMCache loading over this store, times its own file backend (page cache)",
    },
    "router": {"lookup_128k_ms": "a router's lookup of a 128k-token prompt whose beginning it has seen, ms"},
    "hostpool": {
        "arena_cpu_by_straight": "SGLang loading from disk, CPU by way of the node's memory, times straight into its pool"
    },
    "admin": {
        "data_path_slowdown": "data path beside 500 reads/s of the admin API, times beside the same load elsewhere"
    },
}
"""What the README shows of each study."""


def results() -> str:
    """The kept results of the studies, missed targets included."""
    rows = ["| what | measured | target | |", "|---|---|---|---|"]
    for study, shown in MEASURED.items():
        kept = json.loads((DOCS.parent / "benchmarks" / "results" / f"{study}.json").read_text())
        verdicts = judge(kept["figures"], kept["targets"])
        for figure, text in shown.items():
            target = kept["targets"].get(figure, "")
            verdict = "" if verdicts.get(figure, True) else " **missed**"
            rows.append(f"| {text} | {kept['figures'][figure]:.4g} | {target}{verdict} | `{study}` |")
    return "\n".join(rows)


GENERATED = {"configuration.md": settings, "cli.md": commands, "../README.md": results}


def render(file: str) -> str:
    """The text that ``file`` should have: what is between the marks is made anew."""
    text = (DOCS / file).read_text()
    body = f"<!-- generated: make docs -->\n\n{GENERATED[file]()}\n\n<!-- end -->"
    return re.sub(r"<!-- generated: make docs -->.*<!-- end -->", lambda _: body, text, flags=re.S)


if __name__ == "__main__":
    for file in GENERATED:
        (DOCS / file).write_text(render(file))

"""Metrics, alerts, dashboard and runbook name the same things, and those exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from live_metrics import node_metrics, region_metrics, tenant_metrics

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
ALERTS_TEST = ROOT / "deploy" / "prometheus" / "alerts_test.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "kvstore.json"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
PAGE = (ROOT / "docs" / "metrics.md").read_text()
PROMTOOL = shutil.which("promtool")

DOCUMENTED = {
    name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
    for name, kind, labels in re.findall(r"^\| `([\w:]+)` \| (\w+) \| ([^|]*) \|", PAGE, re.MULTILINE)
}
"""Type and labels of every metric on the page."""

RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
]


def panels() -> Iterator[dict[str, Any]]:
    """Those of the dashboard that show something."""
    return (panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row")


def test_the_page_names_what_a_node_and_a_region_show() -> None:
    live = node_metrics() | tenant_metrics() | region_metrics()
    documented = {name for name in DOCUMENTED if name.startswith("kvstore_")}
    assert live.keys() - documented == set(), "on no page"
    assert documented - live.keys() == set(), "gone"
    for name, family in live.items():
        kind, labels = DOCUMENTED[name]
        assert (name, kind) == (name, family.kind)
        assert not family.labels or (name, labels) == (name, family.labels)


def test_the_page_names_what_the_connector_for_vllm_shows() -> None:
    pytest.importorskip("vllm")
    from connectors.vllm.metrics import COUNTERS, PREFIX

    shown = {f"{PREFIX}{name}_total": frozenset({label} - {None}) for name, (_, label) in COUNTERS.items()}
    assert {name: labels for name, (_, labels) in DOCUMENTED.items() if name.startswith("vllm:")} == shown


def test_names_and_labels_keep_the_rules() -> None:
    for name, (kind, labels) in DOCUMENTED.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert labels <= {
            "tier", "tenant", "medium", "operation", "outcome", "reason", "plan", "state", "version", "source", "region", "link",
            "duty", "way",
        }, name  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_alerts_ask_for_metrics_that_exist_and_lead_to_their_entry(rule: dict[str, Any]) -> None:
    assert unknown(rule["expr"]) == set()
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert (page, anchor) == ("docs/runbook.md", rule["alert"].lower())
    entry = RUNBOOK.partition(f"\n### {rule['alert']}\n")[2].partition("\n#")[0]
    for part in ("Means", "Look", "Mend"):
        assert f"**{part}.**" in entry, f"{part} of {rule['alert']}"
    assert len(re.findall(r"^\d\. `", entry, re.MULTILINE)) == 3, "the first three commands"
    assert rule["labels"]["severity"] in ("page", "ticket")


def test_no_entry_without_an_alert_and_no_alert_without_a_test() -> None:
    alerts = [rule["alert"] for rule in RULES]
    assert re.findall(r"^### (KVStore\w+)$", RUNBOOK, re.MULTILINE) == alerts
    assert [test["name"] for test in yaml.safe_load(ALERTS_TEST.read_text())["tests"]] == alerts


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    shown = list(panels())
    assert len(shown) >= 15
    for panel in shown:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert unknown(target["expr"], target["legendFormat"]) == set(), panel["title"]
            assert target["expr"].count("(") == target["expr"].count(")"), panel["title"]
    assert len({panel["id"] for panel in shown}) == len(shown)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_are_raised_when_they_should_be() -> None:
    assert PROMTOOL is not None
    for arguments in (["check", "rules", ALERTS.name], ["test", "rules", ALERTS_TEST.name]):
        done = subprocess.run([PROMTOOL, *arguments], cwd=ALERTS.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_queries_of_the_dashboard_and_the_page_are_valid(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    queries = [query.replace("$__rate_interval", "5m").replace("$__range", "1h") for query in queries]
    queries += re.findall(r"^\| [^|`]+ \| `([^`]+)` \|$", PAGE, re.MULTILINE)
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run([PROMTOOL, "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_every_panel_finds_something_among_the_metrics_of_the_page(tmp_path: Path) -> None:
    """By Prometheus itself, over series with the names and labels of the page: what does not match finds nothing."""
    assert PROMTOOL is not None
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    queries = [query.replace("$__rate_interval", "5m").replace("$__range", "1h") for query in queries]
    asked: dict[str, set[str]] = {"instance": {"a:7070", "b:7070"}, "tenant": {"", "acme"}, "le": {"0.01", "+Inf"}}
    for label, operator, value in re.findall(r'(\w+)(=|!=)"([^"]+)"', " ".join(queries)):
        asked.setdefault(label, {"x"}).add(value if operator == "=" else f"not {value}")
    series = [{"series": 'up{job="kvstore-node", instance="a:7070"}', "values": "1x90"}]
    for name, (kind, labels) in DOCUMENTED.items():
        for part in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
            own = sorted(labels | {"instance", "tenant"} | ({"le"} if part == "_bucket" else set()))
            for values in product(*(sorted(asked.get(label, {"x"})) for label in own)):
                text = ", ".join(f'{label}="{value}"' for label, value in zip(own, values, strict=True) if value)
                series.append({"series": f"{name}{part}{{{text}}}", "values": "1x90" if kind == "gauge" else "0+9x90"})
    found = [
        {"expr": f"count({query}) > bool 0", "eval_time": "80m", "exp_samples": [{"labels": "{}", "value": 1}]}
        for query in (query.replace("$instance", ".*") for query in queries)
    ]
    test = {"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": found}]}
    file = tmp_path / "dashboard.yaml"
    file.write_text(json.dumps(test))
    done = subprocess.run([PROMTOOL, "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def unknown(expression: str, legend: str = "") -> set[str]:
    """Metrics of the expression, and labels of it and its legend, that the page does not have."""
    names = set(re.findall(r"\b(?:vllm:)?kvstore_\w+", expression))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in names}
    families |= names & DOCUMENTED.keys()
    labels = {"job", "instance", "tenant", "le"}
    labels = labels.union(*(DOCUMENTED[name][1] for name in families if name in DOCUMENTED))
    used = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', expression) + re.findall(r"{{(\w+)}}", legend)
    used += re.findall(r"\w+", " ".join(re.findall(r"\b(?:by|on|ignoring|group_left)\s*\(([^)]*)\)", expression)))
    assert names or "up{" in expression, f"asks for nothing of ours: {expression}"
    gone = {name for name in names if not {name, re.sub("_(bucket|sum|count)$", "", name)} & DOCUMENTED.keys()}
    return gone | (set(used) - labels)

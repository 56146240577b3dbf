"""The Helm chart renders for every way to use it, to documents that Kubernetes takes and that run unprivileged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "kvstore"
HELM = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
KUBERNETES = "1.32"

USES = {
    "alone": [],
    "everything": [
        "secretName=secrets",
        "api.enabled=true",
        "api.tokensSecretName=tokens",
        "region.enabled=true",
        "region.name=eu",
        "region.topology=mode = 'off'",
        "region.keySecretName=signing",
        "node.warmAtStart=true",
        "node.readyWarm=0.9",
        "warm.schedule=0 * * * *",
        "warm.budget=1TiB",
        "serviceMonitor.enabled=true",
        "serviceMonitor.tokenSecretName=viewer",
        "prometheusRule.enabled=true",
        "prometheusRule.labels.release=prometheus",
    ],
}

pytestmark = pytest.mark.skipif(HELM is None, reason="helm is not installed")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, check=False)


def render(settings: list[str]) -> list[dict[str, Any]]:
    done = helm("template", "cache", str(CHART), *(word for text in settings for word in ("--set", text)))
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def test_it_has_no_lint() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("use", USES)
def test_kubernetes_takes_every_document(use: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    documents = render(USES[use])
    for document in documents:
        if document["apiVersion"] != "monitoring.coreos.com/v1":  # of an operator, not of Kubernetes
            validate.validate(document, KUBERNETES, strict=True)
    kinds = {document["kind"] for document in documents}
    assert {"DaemonSet", "ConfigMap", "NetworkPolicy", "ServiceAccount"} <= kinds
    assert ({"Deployment", "CronJob", "Service", "ServiceMonitor", "PodMonitor", "PrometheusRule"} <= kinds) == (
        use == "everything"
    )


@pytest.mark.parametrize("use", USES)
def test_containers_run_unprivileged_with_limits(use: str) -> None:
    pods = [template for document in render(USES[use]) if (template := _pod(document))]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        for container in pod["containers"] + pod.get("initContainers", []):
            security = container["securityContext"]
            assert not security["allowPrivilegeEscalation"]
            assert security["readOnlyRootFilesystem"]
            assert security["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["limits"]["memory"]


def test_the_commands_of_its_containers_exist() -> None:
    """Options that were renamed would only be found in a cluster."""
    for document in render(USES["everything"]):
        for container in (_pod(document) or {}).get("containers", []):
            words = [word for word in container.get("args", []) if not word.startswith("-") and "\n" not in word]
            options = [word.partition("=")[0] for word in container.get("args", []) if word.startswith("--")]
            if not words or "command" in container:
                continue
            names = [word for word in words if ":" not in word]
            page = subprocess.run(
                [sys.executable, "-m", "kvstore", *names, "--help"], capture_output=True, text=True, check=False
            )
            assert page.returncode == 0, page.stderr
            assert [option for option in options if option not in page.stdout] == []


def test_its_alerts_are_those_that_are_tested_and_meet_its_own_jobs() -> None:
    documents = {document["kind"]: document for document in render(USES["everything"])}
    rule = documents["PrometheusRule"]
    assert rule["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    endpoints = (
        documents["ServiceMonitor"]["spec"]["endpoints"] + documents["PodMonitor"]["spec"]["podMetricsEndpoints"]
    )
    jobs = {one["replacement"] for endpoint in endpoints for one in endpoint["relabelings"]}
    assert jobs == set(re.findall(r'job="([^"]+)"', json.dumps(rule).replace("\\", "")))


@pytest.mark.parametrize("missing", ["api.tokensSecretName", "region.topology", "region.name", "region.keySecretName"])
def test_what_is_missing_is_named(missing: str) -> None:
    settings = [text for text in USES["everything"] if not text.startswith(missing)]
    done = helm("template", "cache", str(CHART), *(word for text in settings for word in ("--set", text)))
    assert done.returncode != 0
    assert missing in done.stderr


def _pod(document: dict[str, Any]) -> dict[str, Any] | None:
    spec = document.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    pod: dict[str, Any] | None = spec.get("template", {}).get("spec")
    return pod


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", sorted(path.name for path in (DEPLOY / "systemd").iterdir()))
def test_systemd_takes_every_unit(unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(DEPLOY / "systemd" / unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if unit in line and "is not executable" not in line]
    assert complaints == []

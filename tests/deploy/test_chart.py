"""The Helm chart renders for every way to use it, to documents that Kubernetes takes and that run unprivileged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvstore.config import load

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "kvstore"
HELM = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
KUBERNETES = "1.32"

REGION = ["region.enabled=true", "region.name=eu", "region.topology=mode = 'off'", "region.keySecretName=signing"]
OIDC = ["api.oidc.issuer=https://login.example.com", "api.oidc.audience=kvstore"]
USES = {
    "alone": [],
    "everything": [
        *REGION,
        *OIDC,
        "secretName=secrets",
        "encryption.keysSecretName=keys",
        "tenants.bookSecretName=book",
        "api.enabled=true",
        "api.tokensSecretName=tokens",
        "api.peerTokenSecretName=peers",
        r"api.oidc.roles=sre=operator\,platform=admin",
        "api.oidc.roleClaim=groups",
        "api.oidc.tenantClaim=tenant",
        "api.tls.secretName=tls",
        "node.warmAtStart=true",
        "node.readyWarm=0.9",
        "warm.afterInstall=true",
        "warm.nodes=8",
        "warm.schedule=0 * * * *",
        "warm.budget=1TiB",
        "serviceMonitor.enabled=true",
        "serviceMonitor.tokenSecretName=viewer",
        "serviceMonitor.tlsConfig.serverName=kvstore.example.com",
        "prometheusRule.enabled=true",
        "prometheusRule.labels.release=prometheus",
    ],
    "api on loopback": ["api.enabled=true", "node.readyWarm=0.9", *REGION],
    "tokens": ["api.enabled=true", "api.tokensSecretName=tokens", *REGION],
    "an issuer alone": ["api.enabled=true", *OIDC, *REGION],
    "client certificates": [
        *("api.enabled=true", "api.tokensSecretName=tokens", "api.tls.secretName=tls", "api.tls.clientCA=true"),
        *REGION,
    ],
    "a book on the machine": ["config=[tenants]\nbook = '/var/lib/kvstore/tenants.json'"],
}

pytestmark = pytest.mark.skipif(HELM is None, reason="helm is not installed")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, check=False)


@cache
def render(use: str) -> list[dict[str, Any]]:
    done = helm("template", "cache", str(CHART), *(word for text in USES[use] for word in ("--set", text)))
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def test_it_has_no_lint() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("use", USES)
def test_kubernetes_takes_every_document(use: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    documents = render(use)
    for document in documents:
        if document["apiVersion"] != "monitoring.coreos.com/v1":  # of an operator, not of Kubernetes
            validate.validate(document, KUBERNETES, strict=True)
    kinds = {document["kind"] for document in documents}
    assert {"DaemonSet", "ConfigMap", "NetworkPolicy", "ServiceAccount"} <= kinds
    assert ({"Deployment", "Job", "CronJob", "Service", "ServiceMonitor", "PrometheusRule"} <= kinds) == (
        use == "everything"
    )


@pytest.mark.parametrize("use", USES)
def test_containers_run_unprivileged_with_limits(use: str) -> None:
    pods = [template for document in render(use) if (template := _pod(document))]
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
    pods = [pod for document in render("everything") if (pod := _pod(document))]
    commands = {tuple(one["args"]) for pod in pods for one in pod["containers"] if "command" not in one}
    assert len(commands) == 3
    for words in commands:
        names = [word for word in words if not word.startswith("-")]
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        page = subprocess.run(
            [sys.executable, "-m", "kvstore", *names, "--help"], capture_output=True, text=True, check=False
        )
        assert page.returncode == 0, page.stderr
        assert [option for option in options if option not in page.stdout] == []


def test_its_alerts_are_those_that_are_tested_and_meet_its_own_jobs() -> None:
    documents = render("everything")
    (rule,) = (document for document in documents if document["kind"] == "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    monitors = [document["spec"] for document in documents if document["kind"] == "ServiceMonitor"]
    jobs = {
        one["replacement"] for spec in monitors for endpoint in spec["endpoints"] for one in endpoint["relabelings"]
    }
    assert jobs == set(re.findall(r'job="([^"]+)"', json.dumps(rule).replace("\\", "")))


@pytest.mark.parametrize("use", USES)
def test_its_containers_have_a_configuration_that_is_accepted(use: str, tmp_path: Path) -> None:
    """By the rules of the program: names of settings, and that nothing listens elsewhere than on loopback unasked."""
    documents = render(use)
    (maps,) = (document["data"] for document in documents if document["kind"] == "ConfigMap")
    file = tmp_path / "node.toml"
    file.write_text(maps["node.toml"])
    asked = {"everything", "tokens", "an issuer alone", "client certificates"}
    for document in documents:
        pod = _pod(document) or {"containers": [], "volumes": []}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= {volume["name"] for volume in pod["volumes"]}
            environ = {one["name"]: one.get("value", "10.0.0.1") for one in container["env"]}
            environ = {name: text.replace("$(POD_IP)", environ.get("POD_IP", "")) for name, text in environ.items()}
            environ = {name: text for name, text in environ.items() if "__" in name}
            config = load(file, [], environ=environ).config
            files = [Path(text).parent for name, text in environ.items() if text.startswith("/etc/")]
            assert [str(folder) for folder in files if str(folder) not in mounts] == []
            assert container.get("ports", []) == [] or use in asked
            if config.api.listen:
                assert (config.api.address[0] == "10.0.0.1") == (use in asked)
                assert config.api.asks_who == (use in asked)


@pytest.mark.parametrize("use", USES)
def test_probes_and_policies_name_a_port_that_is_open(use: str) -> None:
    documents = render(use)
    opened = set()
    for document in documents:
        for container in (_pod(document) or {"containers": []})["containers"]:
            ports = {port["name"] for port in container.get("ports", [])}
            opened |= ports
            for probe in (container.get("readinessProbe", {}), container.get("livenessProbe", {})):
                for kind in ("httpGet", "tcpSocket"):
                    assert kind not in probe or probe[kind]["port"] in ports
    (policy,) = (document["spec"] for document in documents if document["kind"] == "NetworkPolicy")
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == (opened or {1})


@pytest.mark.parametrize(
    ("use", "missing", "named"),
    [
        ("everything", "region.topology", "region.topology"),
        ("everything", "region.name", "region.name"),
        ("everything", "region.keySecretName", "region.keySecretName"),
        ("everything", "api.oidc.audience", "api.oidc.audience"),
        ("everything", "serviceMonitor.tokenSecretName", "serviceMonitor.tokenSecretName"),
        ("everything", "api.enabled", "serviceMonitor.enabled wants api.enabled"),
        ("client certificates", "api.tls.secretName", "api.tls.secretName"),
    ],
)
def test_what_is_missing_is_named(use: str, missing: str, named: str) -> None:
    settings = [text for text in USES[use] if not text.startswith(missing)]
    done = helm("template", "cache", str(CHART), *(word for text in settings for word in ("--set", text)))
    assert done.returncode != 0
    assert named in done.stderr


def _pod(document: dict[str, Any]) -> dict[str, Any] | None:
    spec = document.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    pod: dict[str, Any] | None = spec.get("template", {}).get("spec")
    return pod

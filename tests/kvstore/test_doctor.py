"""What the doctor finds on machines that are fit and on machines that are not."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.config import load
from kvstore.doctor import Finding, Verdict, examine
from kvstore.testing.servers import S3Server


def findings(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Finding]:
    paths = [f"node.directory={folder}/data", f"node.socket={folder}/node.sock", "disk.bytes=64MiB", "host.bytes=64MiB"]
    config = load(overrides=[*paths, "disk.segment_bytes=16MiB", *overrides], environ={}).config
    return {finding.name: finding for finding in examine(config)}


def test_a_fit_machine_without_a_node(tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert {finding.verdict for finding in found.values()} <= {Verdict.OK, Verdict.WARN}
    assert found["node"].verdict is Verdict.WARN
    assert found["shared memory"].verdict is Verdict.OK
    assert found["disk"].verdict is Verdict.OK
    assert list(tmp_path.iterdir()) == [], "something was left behind"


@pytest.mark.parametrize(("override", "name"), [("host.bytes=100TiB", "shared memory"), ("disk.bytes=9000TiB", "disk")])
def test_what_does_not_fit_fails_with_a_remedy(tmp_path: Path, override: str, name: str) -> None:
    finding = findings(tmp_path, [override])[name]
    assert finding.verdict is Verdict.FAIL
    assert override.partition("=")[0] in finding.remedy


def test_a_disk_that_is_switched_off_is_not_touched(tmp_path: Path) -> None:
    found = findings(tmp_path, ["disk.enabled=false"])
    assert found["disk"].verdict is found["disk speed"].verdict is Verdict.OK


def bucket(server: S3Server, name: str) -> list[str]:
    return [
        f"object.url=s3://{name}/blocks",
        f"object.endpoint={server.endpoint}",
        f"object.access_key_id={server.access_key}",
        f"object.secret_access_key={server.secret_key}",
        "disk.enabled=false",
    ]


@pytest.mark.s3
def test_a_bucket_that_answers(tmp_path: Path, ministack_server: S3Server) -> None:
    found = findings(tmp_path, [*bucket(ministack_server, "doctor"), "object.create_bucket=true"])
    assert found["object store"].verdict is Verdict.OK
    assert "conditional writes" in found["object store"].finding
    assert found["tenant secret"].verdict is Verdict.WARN
    found = findings(tmp_path, [*bucket(ministack_server, "doctor"), "identity.secret=a-secret-of-some-length"])
    assert found["tenant secret"].verdict is Verdict.OK


@pytest.mark.s3
def test_a_bucket_that_is_not_there(tmp_path: Path, ministack_server: S3Server) -> None:
    finding = findings(tmp_path, bucket(ministack_server, "absent-bucket"))["object store"]
    assert finding.verdict is Verdict.FAIL
    assert "no such bucket" in finding.finding


@pytest.mark.s3
def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    nobody = ["object.url=s3://somewhere", "object.endpoint=http://127.0.0.1:9", "disk.enabled=false"]
    keys = ["object.access_key_id=a", "object.secret_access_key=b"]
    assert findings(tmp_path, [*nobody, *keys])["object store"].verdict is Verdict.FAIL


def test_a_folder_as_object_store(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    found = findings(tmp_path, [f"object.url=file://{tmp_path}/bucket", "disk.enabled=false"])
    assert found["object store"].verdict is Verdict.OK


def test_a_catalog_that_answers_and_one_that_does_not(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    folder = [f"object.url=file://{tmp_path}/bucket", "disk.enabled=false"]
    finding = findings(tmp_path, [*folder, f"catalog.url=sqlite://{tmp_path}/catalog.db"])["catalog"]
    assert "0 blocks" in finding.finding
    finding = findings(tmp_path, [*folder, "catalog.url=redis://127.0.0.1:9/0"])["catalog"]
    assert finding.verdict is Verdict.FAIL

"""Keys that a KMS keeps encrypted, against a server that speaks its protocol."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import boto3
import pytest
from typer.testing import CliRunner

from kvstore.cli import app
from kvstore.encryption import KeyFile, TenantKeys, new_key
from kvstore.errors import ConfigError
from kvstore.kms import Kms
from kvstore.testing.node import wait_for
from kvstore.testing.servers import S3Server, free_port, ministack

pytestmark = pytest.mark.s3

REGION = "us-east-1"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with ministack() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
        patch.setenv("AWS_ENDPOINT_URL_KMS", server.endpoint)
        yield server


@pytest.fixture(scope="module")
def key(server: S3Server) -> str:
    made = boto3.client("kms", region_name=REGION).create_key(Description="test")
    return str(made["KeyMetadata"]["KeyId"])


def written(path: Path, *lines: str) -> Path:
    scratch = path.with_suffix(".new")
    scratch.touch(0o600)
    scratch.write_text("\n".join(lines))
    os.replace(scratch, path)
    return path


def test_a_line_from_the_command_line_opens_the_same_secret_everywhere(
    server: S3Server, key: str, tmp_path: Path
) -> None:
    made = CliRunner().invoke(app, ["key", "--kms", key, f"--set=object.region={REGION}"])
    assert made.exit_code == 0, made.output
    file = written(tmp_path / "keys", made.stdout.strip())
    one = KeyFile(file, "a", Kms(REGION).unwrap)
    other = KeyFile(file, "a", Kms(REGION).unwrap)
    identity, secret = one.active()
    assert (identity, secret) == other.active()
    assert identity.hex() == made.stdout[:16]
    assert secret.hex() not in file.read_text()
    assert KeyFile(file, "b", Kms(REGION).unwrap).active()[1] != secret


def test_what_is_decrypted_is_the_secret_of_the_ring(server: S3Server, key: str) -> None:
    kms = Kms(REGION)
    wrapped, plain = kms.new_line(key), new_key()
    unwrapped = kms.unwrap(f"{wrapped} {plain}").split()
    assert unwrapped[1] == plain
    assert TenantKeys("\n".join(unwrapped), "a").active()[0].hex() == wrapped[:16]
    server.stop()
    try:
        assert kms.unwrap(wrapped) == unwrapped[0], "asked again for what it knows"
    finally:
        server.restart()


def test_keys_rotate_while_the_file_is_in_use(server: S3Server, key: str, tmp_path: Path) -> None:
    kms = Kms(REGION)
    first, second = kms.new_line(key), kms.new_line(key)
    file = written(tmp_path / "keys", first)
    keys = KeyFile(file, "a", kms.unwrap)
    before = keys.active()
    written(file, second, first)
    wait_for(lambda: keys.active()[0].hex() == second[:16])
    assert keys.get(before[0]) == before[1]


def test_a_ciphertext_under_another_id_is_refused(server: S3Server, key: str) -> None:
    kms = Kms(REGION)
    line = kms.new_line(key)
    with pytest.raises(ConfigError, match="KMS gives no key"):
        kms.unwrap("00" * 8 + line[16:])


def test_without_the_kms_nothing_starts(
    server: S3Server, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kms = Kms(REGION)
    file = written(tmp_path / "keys", kms.new_line(key))
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{free_port()}")
    nobody = Kms(REGION)
    with pytest.raises(ConfigError, match="kms:Decrypt"):
        KeyFile(file, "a", nobody.unwrap)
    with pytest.raises(ConfigError, match="base64"):
        kms.unwrap("00" * 8 + ":kms:?")


def test_no_block_waits_for_the_kms(server: S3Server, key: str, tmp_path: Path) -> None:
    kms, answers = Kms(REGION), Event()

    def slow(text: str) -> str:
        if ":kms:" in text:
            answers.wait(30)
        return kms.unwrap(text)

    plain, wrapped = new_key(), kms.new_line(key)
    file = written(tmp_path / "keys", plain)
    keys = KeyFile(file, "a", slow)
    written(file, wrapped, plain)
    assert keys.active()[0].hex() == plain[:16]
    assert keys.get(bytes.fromhex(wrapped[:16])) is None
    answers.set()
    wait_for(lambda: keys.active()[0].hex() == wrapped[:16])

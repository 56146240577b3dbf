from pathlib import Path

import pytest
from pydantic import SecretStr

from kvstore.config import Config, Loaded, fields, load
from kvstore.config.schema import PUBLIC_SECRET
from kvstore.config.sources import DEFAULT, MASK
from kvstore.errors import ConfigError


def origin(loaded: Loaded, name: str) -> tuple[str, str]:
    (setting,) = [s for s in loaded.settings() if s.name == name]
    return setting.value, setting.origin


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text('# a comment\n[host]\nbytes = "2GiB"\n\n[disk]\nthreads = 8\nbytes = "3GiB"\n')
    return path


def test_later_sources_win_and_each_value_knows_its_origin(toml: Path) -> None:
    environ = {"KVSTORE_DISK__THREADS": "6", "KVSTORE_DISK__BYTES": "5GiB", "HOME": "/nowhere"}
    loaded = load(toml, ["disk.bytes=7GiB"], environ)
    assert loaded.config.host.bytes == 2 << 30
    assert origin(loaded, "host.bytes") == ("2GiB", f"{toml}:3")
    assert origin(loaded, "disk.threads") == ("6", "KVSTORE_DISK__THREADS")
    assert origin(loaded, "disk.bytes") == ("7GiB", "--set")
    assert origin(loaded, "disk.enabled") == ("true", DEFAULT)


def test_the_environment_may_name_the_file(toml: Path) -> None:
    assert load(environ={"KVSTORE_CONFIG": str(toml)}).config.disk.threads == 8


def test_what_kubernetes_sets_for_a_service_called_kvstore_is_no_setting() -> None:
    environ = {"KVSTORE_PORT": "tcp://10.0.0.1:80", "KVSTORE_SERVICE_HOST": "10.0.0.1"}
    assert load(environ=environ).origins == {}


@pytest.mark.parametrize(
    ("override", "field", "remedy"),
    [
        ("host.byts=1GiB", "host.byts", "Did you mean host.bytes?"),
        ("host.bytes=3G", "host.bytes", "16GiB"),
        ("host.bytes=1MiB", "host.bytes", "extent_bytes"),
        ("host.extent_bytes=70001", "host.extent_bytes", "64MiB"),
        ("disk.threads=0", "disk.threads", "Reads and writes"),
        ("disk.bytes=1MiB", "disk.bytes", "segment_bytes"),
        ("disk.enabled=perhaps", "disk.enabled", "local disk"),
        ("node.log_level=loud", "node.log_level", "logged"),
        ("object.url=s3:/bucket", "object.url", "lower case"),
        ("object.url=s3://UPPER/x", "object.url", "lower case"),
        ("object.endpoint=localhost:9000", "object.endpoint", "https://host:port"),
        ("object.access_key_id=me", "object.access_key_id", "both"),
        ("identity.tenant=a/b", "identity.tenant", "Tenant"),
        ("write.queue_bytes=2GiB", "write.queue_bytes", "empty"),
        ("nonsense", "--set", "section.key=value"),
    ],
)
def test_what_cannot_work_is_refused_with_field_and_remedy(override: str, field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(overrides=[override], environ={})
    assert refusal.value.field == field
    assert remedy in refusal.value.remedy


@pytest.mark.parametrize("text", ["bytes = 3\n", "[host\n", "[host]\nbytes = {}\n"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load(path, environ={})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "absent.toml", environ={})


SECRET = "correct horse battery staple"


@pytest.mark.parametrize(
    "name", ["identity.secret", "object.secret_access_key", "object.session_token", "catalog.password"]
)
def test_secrets_are_masked_wherever_a_setting_is_shown(name: str) -> None:
    loaded = load(
        overrides=[f"{name}={SECRET}", "object.access_key_id=id", "object.secret_access_key=" + SECRET], environ={}
    )
    assert origin(loaded, name) == (MASK, "--set")
    assert SECRET not in repr(loaded)


@pytest.mark.parametrize(
    "override",
    ["identity.secret=tiny", "identity.secrets=tiny", "object.secret_access_key=tiny", "catalog.passwords=tiny"],
)
def test_an_error_does_not_show_a_secret(override: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(overrides=[override], environ={})
    assert "tiny" not in str(refusal.value)


def test_the_tenant_secret_comes_from_the_setting_or_a_file_or_is_public(tmp_path: Path) -> None:
    assert Config().identity.is_public
    assert Config().identity.secret_bytes() == PUBLIC_SECRET
    assert load(overrides=[f"identity.secret={SECRET}"], environ={}).config.identity.secret_bytes() == SECRET.encode()
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    identity = load(overrides=[f"identity.secret_file={file}"], environ={}).config.identity
    assert not identity.is_public
    assert identity.secret_bytes() == SECRET.encode()
    file.write_text("short")
    with pytest.raises(ConfigError, match="less than 16 bytes"):
        identity.secret_bytes()
    file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        identity.secret_bytes()


def test_one_secret_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of the two"):
        load(overrides=[f"identity.secret={SECRET}", f"identity.secret_file={tmp_path}"], environ={})


def test_empty_text_means_not_set_where_a_setting_may_be_absent() -> None:
    assert load(environ={"KVSTORE_OBJECT__BYTES": ""}).config.object.bytes is None
    with pytest.raises(ConfigError):
        load(environ={"KVSTORE_HOST__BYTES": ""})


def test_shown_values_can_be_set_back() -> None:
    shown = [f"{s.name}={s.value}" for s in load(environ={}).settings()]
    assert load(overrides=shown, environ={}).config == Config()


def test_keys_are_few_and_described() -> None:
    keys = list(fields())
    assert len(keys) < 70
    assert all(description.endswith(".") for *_, description in keys)


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().host.bytes = 1  # type: ignore[misc]
    assert isinstance(Config().identity.secret, SecretStr)

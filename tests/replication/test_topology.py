"""The topology file: what a good one means, and what is said about a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest
from region_cases import KEY

from kvstore.errors import ConfigError
from replication.keys import create_key, parse_public, public_text, read_key
from replication.manifest import Label
from replication.topology import Topology, load_topology

EXAMPLE = Path(__file__).parents[2] / "docs" / "regions.toml"
PUBLIC = public_text(KEY.public_key())

GOOD = f"""
mode = "enforce"
[regions.na]
url = "s3://kv-na/prod"
endpoints = ["https://one.example.com", "https://two.example.com"]
location = "US"
public_key = "{PUBLIC}"
[regions.eu]
url = "s3://kv-eu/prod"
location = "DE"
[[flows]]
from = "na"
to = ["eu"]
models = ["llama*"]
max_bytes = "2TiB"
price_per_gb = 0.02
money_per_month = 10
[[residency]]
tenants = ["bank-*"]
allowed = ["US"]
"""


def load(tmp_path: Path, text: str) -> Topology:
    file = tmp_path / "regions.toml"
    file.write_text(text)
    return load_topology(file)


def label(model: str = "llama-3", tenant: str = "shop") -> Label:
    return Label(b"n" * 16, model, tenant, 64)


def test_the_example_is_a_topology() -> None:
    topology = load_topology(EXAMPLE)
    assert {flow.source for flow in topology.flows} == {"na"}
    assert topology.regions.keys() == {"na", "eu", "apac"}
    assert not topology.permits(label(tenant="bank-1"), "apac")


def test_what_a_file_says(tmp_path: Path) -> None:
    topology = load(tmp_path, GOOD)
    (flow,) = topology.flows_to("eu")
    assert flow.max_bytes == 2 << 40
    assert flow.takes(label())
    assert not flow.takes(label(model="qwen"))
    assert [link.endpoint for link in topology.links("na")] == ["https://one.example.com", "https://two.example.com"]
    assert list(topology.flows_to("na")) == []


@pytest.mark.parametrize(
    ("rule", "permitted"),
    [
        ('allowed = ["US"]', False),
        ('allowed = ["DE"]', True),
        ('allowed = ["eu"]', True),
        ('forbidden = ["DE"]', False),
        ('forbidden = ["eu"]', False),
        ('forbidden = ["US"]', True),
        ('tenants = ["other"]\nforbidden = ["DE"]', True),
        ('models = ["llama*"]\nforbidden = ["DE"]', False),
    ],
)
def test_residency(tmp_path: Path, rule: str, permitted: bool) -> None:
    topology = load(tmp_path, f"{GOOD}\n[[residency]]\n{rule}")
    assert topology.permits(label(), "eu") is permitted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('mode = "enforce"', 'mode = "yes"'), ["mode", "yes"]),
        (('to = ["eu"]', 'to = ["mars"]'), ["mars", "na, eu"]),
        (('to = ["eu"]', 'to = ["na"]'), ["itself"]),
        (('to = ["eu"]', "to = []"), ["flows.0.to"]),
        ((f'public_key = "{PUBLIC}"', ""), ["no public_key", "kvstore region key"]),
        ((PUBLIC, "rubbish"), ["regions.na.public_key", "rubbish", "base64"]),
        (("2TiB", "2 lots"), ["flows.0.max_bytes", "2 lots", "16GiB"]),
        (("price_per_gb = 0.02", ""), ["price_per_gb"]),
        (("[regions.eu]", "[regions.EU]"), ["EU", "lower-case"]),
        (("location", "locatoin"), ["regions.na.locatoin"]),
        (('allowed = ["US"]', 'allowed = ["FR"]'), ["FR"]),
        (('allowed = ["US"]', ""), ["allowed or forbidden"]),
        (('endpoints = ["https://one.example.com", "https://two.example.com"]', "endpoints = []"), ["no endpoint"]),
        (('url = "s3://kv-eu/prod"', ""), ["regions.eu.url"]),
        (("[[flows]]", "[[flows"), ["not TOML"]),
        (("[[residency]]", '[[flows]]\nfrom = "na"\nto = ["eu"]\nmodels = ["llama*"]\n[[residency]]'), ["two flows"]),
    ],
)
def test_what_is_said_of_a_bad_file(tmp_path: Path, change: tuple[str, str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, GOOD.replace(*change))
    for words in said:
        assert words in str(refusal.value)


class TestCredentials:
    def test_from_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names = 'access_key_id_env = "NA_KEY"\nsecret_access_key_env = "NA_SECRET"\nlocation = "US"'
        topology = load(tmp_path, GOOD.replace('location = "US"', names))
        with pytest.raises(ConfigError, match="NA_KEY"):
            topology.links("na")
        monkeypatch.setenv("NA_KEY", "id")
        monkeypatch.setenv("NA_SECRET", "hidden")
        link = topology.links("na")[0]
        assert (link.access_key_id, link.secret_access_key) == ("id", "hidden")
        assert "hidden" not in repr(link)

    def test_from_a_file(self, tmp_path: Path) -> None:
        credentials = tmp_path / "na.toml"
        topology = load(
            tmp_path, GOOD.replace('location = "US"', f'credentials_file = "{credentials}"\nlocation = "US"')
        )
        with pytest.raises(ConfigError, match=r"regions\.na\.credentials_file"):
            topology.links("na")
        credentials.write_text('access_key_id = "id"\n')
        with pytest.raises(ConfigError, match="not the keys"):
            topology.links("na")
        credentials.write_text('access_key_id = "id"\nsecret_access_key = "hidden"\n')
        assert topology.links("na")[0].secret_access_key == "hidden"

    def test_one_place_only(self, tmp_path: Path) -> None:
        names = 'access_key_id_env = "A"\nsecret_access_key_env = "B"\ncredentials_file = "c"\nlocation = "US"'
        with pytest.raises(ConfigError, match="exclude"):
            load(tmp_path, GOOD.replace('location = "US"', names))


class TestKeys:
    def test_a_key_is_written_for_its_owner_only_and_never_over_another(self, tmp_path: Path) -> None:
        file = tmp_path / "na.pem"
        key = create_key(file)
        assert file.stat().st_mode & 0o777 == 0o600
        text = public_text(read_key(file, "--key").public_key())
        parse_public(text).verify(key.sign(b"x"), b"x")
        with pytest.raises(ConfigError, match="exists"):
            create_key(file)

    def test_other_files_are_no_keys(self, tmp_path: Path) -> None:
        file = tmp_path / "na.pem"
        file.write_text("rubbish")
        with pytest.raises(ConfigError, match="--key"):
            read_key(file, "--key")
        with pytest.raises(ConfigError, match="No such file"):
            read_key(tmp_path / "none", "--key")

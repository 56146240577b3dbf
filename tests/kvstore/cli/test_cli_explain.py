"""``kvstore explain``, ``pin``, ``unpin`` and ``pins``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_site import BLOCK_BYTES, BLOCKS, NAMESPACE, Site

from kvstore.node.api import About
from kvstore.testing.node import PatientClient


def document(site: Site, *arguments: str) -> Any:
    result = site.run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored prompt and one block more."""
    file = tmp_path_factory.mktemp("prompt") / "ids.json"
    file.write_text(json.dumps(list(range(NAMESPACE.block_tokens * (BLOCKS + 1)))))
    return file


def test_explain_a_prompt(shared: Site, ids: Path) -> None:
    found = document(shared, "explain", "--tokens", str(ids))
    assert [block["key"] for block in found["blocks"][:BLOCKS]] == [key.hex() for key in shared.keys]
    assert [block["why"] for block in found["blocks"]] == ["held"] * BLOCKS + ["never_stored"]
    text = shared.run("explain", "--tokens", str(ids))
    for expected in ("5 of 6 blocks of 16 tokens", "host, disk", "never stored", shared.keys[0].hex(), "0-4", "0-79"):
        assert expected in text.stdout
    assert "history reaches back" in text.stderr
    assert document(shared, "explain", "--key", shared.keys[2].hex())["chain_blocks"] == 3


def test_explain_a_request(shared: Site) -> None:
    with PatientClient(shared.node.socket, name="vLLM") as client:
        client.open_namespace(NAMESPACE, BLOCK_BYTES)
        client.lookup(shared.keys, about=About("chatcmpl-7-0-ab"))
    assert "Request chatcmpl-7-0-ab of vLLM to tiny-llama" in shared.run("explain", "chatcmpl-7").stdout


def test_text_becomes_the_tokens_that_the_model_sees(shared: Site, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        ["a prompt of some words"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path)
    prompt = "a prompt of some words, " * 20
    (tmp_path / "ids").write_text(json.dumps(bpe.encode(prompt).ids))
    (tmp_path / "prompt").write_text(prompt)
    by_text = document(shared, "explain", "--file", str(tmp_path / "prompt"), "--tokenizer", str(tmp_path))
    by_ids = document(shared, "explain", "--tokens", str(tmp_path / "ids"))
    assert by_text["chain_blocks"] > 3
    assert [block["key"] for block in by_text["blocks"]] == [block["key"] for block in by_ids["blocks"]]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("explain",), 2),
        (("explain", "some-request", "--text", "x"), 2),
        (("explain", "--text", "x"), 2),
        (("explain", "--text", "x", "--tokenizer", "/nowhere"), 2),
        (("explain", "--tokens", "/nowhere"), 2),
        (("explain", "--key", "abc"), 2),
        (("explain", "no-such-request"), 1),
        (("explain", "--key", "00" * 16), 1),
        (("pin", "--key", "00" * 16, "--for", "soon"), 2),
        (("unpin", "--key", "00" * 16), 1),
    ],
)
def test_what_names_no_prompt_is_refused(shared: Site, arguments: tuple[str, ...], status: int) -> None:
    result = shared.run(*arguments)
    assert result.exit_code == status, result.output
    assert "Error:" in result.stderr


def test_token_ids_that_are_none(shared: Site, tmp_path: Path) -> None:
    for content in ("[1, 2", '["a"]', "[-1]", "-5 7"):
        (tmp_path / "ids").write_text(content)
        assert shared.run("explain", "--tokens", str(tmp_path / "ids")).exit_code == 2


def test_pin_list_and_unpin(site: Site) -> None:
    assert "Nothing" in site.run("pins").stderr
    pinned = site.run("pin", "--key", site.keys[-1].hex(), "--for", "30min")
    assert f"{BLOCKS} blocks pinned for 30min; held now: 5 in host, 5 in disk" in pinned.stdout
    (pin,) = document(site, "pins")
    assert (pin["key"], pin["blocks"]) == (site.keys[-1].hex(), BLOCKS)
    assert "30 min" in site.run("pins").stdout
    assert document(site, "unpin", "--key", site.keys[-1].hex()) == {"unpinned": BLOCKS}
    assert document(site, "pins") == []

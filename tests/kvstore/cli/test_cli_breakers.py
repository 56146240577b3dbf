"""``kvstore breakers``, and how ``kvstore hot`` shows text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from cli_site import BLOCK_BYTES, NAMESPACE, Site
from typer.testing import CliRunner

from kvstore.cli import app
from kvstore.identity import chain_digests
from kvstore.node.api import About, Description
from kvstore.policy.content import pieces
from kvstore.testing.node import PatientClient

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

MANUAL = [
    f"Step {n}: turn valve {n * 37 % 101} by {n * 13 % 90} degrees, then read gauge {n * 71 % 53}." for n in range(90)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        MANUAL, tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    return folder


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_a_file_of_prompts(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    dates = ["2026-11-22", "2026-11-23", "2026-11-24"]
    rows = [
        {"id": f"r{n}", "prompt": f"You are a helper. It is {date}. {' '.join(MANUAL)}"} for n, date in enumerate(dates)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    text = run("breakers", "--prompts", str(file), "--tokenizer", str(tokenizer))
    assert text.exit_code == 0, text.output
    assert "3 prompts" in text.stdout
    assert "is the first that differs" in text.stdout
    assert "r1: '3. Step" in text.stdout, "the text that breaks the prefix is shown"
    report = json.loads(run("breakers", "--prompts", str(file), "--tokenizer", str(tokenizer), "--json").stdout)
    (breaker,) = report["breakers"]
    assert breaker["shareable"] > 0.5 * report["tokens"]


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    source = random.Random(1)
    same = [source.randrange(1000) for _ in range(500)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps([n, *same]) for n in range(3)) + "\n\n" + json.dumps({"tokens": same}))
    report = json.loads(run("breakers", "--prompts", str(file), "--json").stdout)
    assert report["prompts"] == 4
    assert report["breakers"][0]["shareable"] > 800


@pytest.mark.parametrize("content", ["not json", '"text without a tokenizer"', "{}", "[1, -1]", '["a"]', "7"])
def test_what_are_no_prompts_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert run("breakers", "--prompts", str(file)).exit_code == 2
    assert run("breakers", "--prompts", str(tmp_path / "absent")).exit_code == 2


def test_traffic_of_a_node(site: Site, tokenizer: Path) -> None:
    assert "content_fingerprints" in site.run("breakers").stderr
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    for number in range(3):
        tokens = loaded.encode(f"Request {number}. {' '.join(MANUAL)}")
        cut = pieces(tokens, b"secret")
        with PatientClient(site.node.socket) as client:
            keyring = client.open_namespace(NAMESPACE, BLOCK_BYTES)
            keys = keyring.block_keys(chain_digests(tokens, NAMESPACE.block_tokens))
            about = About(f"cmpl-{number}")
            client.lookup(keys, about=about)
            client.lookup(keys[:1], about=about)
            client.lookup(keys, about=about)
            head, tail = tuple(tokens[:12]), tuple(tokens[-4:])
            client.describe(about, Description(cut.tokens, cut.starts.tobytes(), cut.hashes.tobytes(), head, tail))
    text = site.run("breakers").stdout
    assert "3 prompts" in text
    assert "cmpl-1 at" in text
    with PatientClient(site.node.socket) as client:  # the last prompt again, from another client: now it is hot
        client.open_namespace(NAMESPACE, BLOCK_BYTES)
        client.lookup(keys)
    assert "Request 2." in site.run("hot", "--tokenizer", str(tokenizer)).stdout
    (prompt, *_) = json.loads(site.run("hot", "--tokenizer", str(tokenizer), "--json").stdout)
    assert prompt["preview"].startswith("Request 2.")
    assert "Request" not in site.run("hot").stdout

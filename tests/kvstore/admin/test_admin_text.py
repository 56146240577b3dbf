"""Lookups of text, with the models' own tokenizer files."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_site import BLOCKS, TOKENS, api_site

from kvstore.admin.problems import Problem
from kvstore.admin.tokenizers import Tokenizers

tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{number}" for number in range(len(TOKENS))]


def write_tokenizer(folder: Path) -> None:
    """One token a word, ``w7`` being token 7."""
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_text_finds_what_its_tokens_find(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "org" / "toy")
    with api_site(f"api.tokenizers={tmp_path}") as site:
        prompt = {"namespace": "org/toy", "text": " ".join(WORDS)}
        assert site.post("/v1/lookup", prompt)["tiers"][0]["usable_blocks"] == BLOCKS
        assert site.post("/v1/explain", prompt)["usable_blocks"] == BLOCKS
        assert site.post("/v1/lookup", {**prompt, "text": "w1 " + prompt["text"]})["tiers"][0]["usable_blocks"] == 0


@pytest.mark.parametrize("model", ["absent", "../outside", "/outside", "broken"])
async def test_a_model_without_a_usable_tokenizer_is_refused(tmp_path: Path, model: str) -> None:
    write_tokenizer(tmp_path / "outside")
    (tmp_path / "inside" / "broken").mkdir(parents=True)
    (tmp_path / "inside" / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(Problem) as refused:
        await Tokenizers(tmp_path / "inside")(model, "w1")
    assert refused.value.status == 422

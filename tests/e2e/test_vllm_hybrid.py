"""A real vLLM engine of a hybrid model on a CPU: two kinds of attention, three KV cache groups, one chain of blocks.

Gemma 3's architecture with made-up weights: two layers attend to every token, four to the last 128. float32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from hybrid_cases import OUTPUT, PROMPTS, Engines, make_hybrid, one_by_one, serving, tokens

from kvstore.testing.node import alter_host_blocks, flip_every_fifth_block, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TOKEN_BYTES = 6 * 2 * 4 * 64 * 4
"""Of KV: layers, K and V, heads, dimensions, float32."""
ENGINE = {"max_model_len": 2048, "num_gpu_blocks_override": 200, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("hybrid")
    model = make_hybrid(
        folder / "model", "Gemma3Text", num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2, sliding_window=128,
        query_pre_attn_scalar=4,
    )  # fmt: skip
    with serving(folder, model, **ENGINE) as engines:
        yield engines


def test_a_hybrid_model_loads_what_another_engine_saved(engines: Engines) -> None:
    node, loader = engines.node, engines.loader
    expected = tokens(one_by_one(engines.plain))
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS), "the model must tell the prompts apart"
    assert tokens(one_by_one(engines.saver)) == expected
    wait_for(lambda: node.blocks()["disk"] == node.blocks()["host"] >= 12)

    wait_for(engines.loads)
    loader.forget()
    answers = one_by_one(loader)
    assert tokens(answers) == expected
    assert sum(answer.cached_tokens for answer in answers) > sum(answer.prompt_tokens for answer in answers) / 2
    counters = loader.counters()
    bytes_of_tokens = counters["vllm:kvstore_tokens_loaded{host}"] * TOKEN_BYTES
    assert counters["vllm:kvstore_bytes_loaded"] < 0.7 * bytes_of_tokens, (
        "of window layers only the last window is loaded"
    )
    loader.forget()
    assert tokens(loader.generate(PROMPTS, OUTPUT)) == expected

    # A load that fails half way is computed again, all of it: its windows are not there.
    node.stop()
    assert flip_every_fifth_block(node)
    engines.restart_node()
    loader.forget()
    assert tokens(one_by_one(loader)) == expected
    assert loader.counters()["vllm:kvstore_blocks_missed{corrupt}"] > 0

    # The control: were wrong KV loaded, this test would see it.
    with node.client() as client:
        assert alter_host_blocks(client)
    loader.forget()
    altered = tokens(one_by_one(loader))
    assert sum(answer == right for answer, right in zip(altered, expected, strict=True)) <= 1

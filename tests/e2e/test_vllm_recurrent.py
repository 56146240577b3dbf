"""A real vLLM engine on a CPU of a model with recurrent layers: blocks of its attention layer, and states behind them.

LFM2's architecture with made-up weights: one layer attends, three are short convolutions. float32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from hybrid_cases import PROMPTS, Engines, make_hybrid, one_by_one, serving, tokens

from kvstore.identity import BlockKey
from kvstore.node.client import Client
from kvstore.testing.node import alter_host_blocks, flip_every_fifth_block, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ENGINE = {
    "max_model_len": 2048, "num_gpu_blocks_override": 400, "max_num_batched_tokens": 256,
    "prefix_cache_retention_interval": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("recurrent")
    model = make_hybrid(
        folder / "model", "Lfm2", num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "conv"], conv_dim=256, conv_dim_out=256, block_dim=256,
        block_ff_dim=512, block_auto_adjust_ff_dim=False, block_multiple_of=256, block_ffn_dim_multiplier=1.0,
        block_norm_eps=1e-5, block_use_swiglu=True,
    )  # fmt: skip
    with serving(folder, model, **ENGINE) as engines:
        yield engines


def states(client: Client) -> set[BlockKey]:
    """Keys of the states in memory."""
    known = {row["digest"]: row["fields"]["attention"] for row in client.call("status")["namespaces"]}
    blocks = client.call("list", medium="host", limit=1000)["blocks"]
    return {BlockKey(row["key"]) for row in blocks if known[row["namespace"]].startswith("state:")}


def cached(engines: Engines) -> int:
    engines.loader.forget()
    return sum(answer.cached_tokens for answer in one_by_one(engines.loader))


def test_states_are_loaded_with_the_blocks_before_them(engines: Engines) -> None:
    node, loader = engines.node, engines.loader
    expected = tokens(one_by_one(engines.plain))
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS), "the model must tell the prompts apart"
    assert tokens(one_by_one(engines.saver)) == expected
    wait_for(lambda: node.blocks()["disk"] == node.blocks()["host"] >= 20)

    wait_for(engines.loads)
    loader.forget()
    answers = one_by_one(loader)
    assert tokens(answers) == expected
    assert all(answer.cached_tokens > 0.8 * answer.prompt_tokens for answer in answers), "up to the last page's end"
    loader.forget()
    together = loader.generate(
        PROMPTS, 1
    )  # no more: vLLM 0.32 on a CPU errs, without a store too, where one decodes meanwhile
    assert tokens(together) == [answer[:1] for answer in expected]

    # Were a wrong state loaded, this test would see it.
    with node.client() as client:
        assert alter_host_blocks(client, states(client))
    loader.forget()
    altered = tokens(one_by_one(loader))
    assert not any(answer == right for answer, right in zip(altered, expected, strict=True))

    # A load that fails half way is computed again, all of it.
    node.stop()
    assert flip_every_fifth_block(node)
    engines.restart_node()
    loader.forget()
    assert tokens(one_by_one(loader)) == expected
    assert loader.counters()["vllm:kvstore_blocks_missed{corrupt}"] > 0

    # Blocks without a state behind them are of no use, and do no harm; what is computed puts the states back.
    before = cached(engines)
    with node.client() as client:
        client.delete(list(states(client)))
    loader.forget()
    answers = one_by_one(loader)
    assert tokens(answers) == expected
    assert sum(answer.cached_tokens for answer in answers) < before
    wait_for(lambda: cached(engines) >= before)
    loader.forget()
    assert tokens(one_by_one(loader)) == expected

"""vLLM on a GPU and SGLang name the blocks of a model alike, each by its own reading of the model's configuration."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from sglang_process import HERE, ROOT, environment, sglang_python

pytest.importorskip("vllm")

from vllm.config import ModelConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from connectors.vllm.keys import geometry
from connectors.vllm.options import Options
from kvstore.identity import NO_PARENT, Namespace, chain_digests
from kvstore.node.api import NewBlock
from kvstore.testing.node import PatientClient, RunningNode

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

BASE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LLAMA = {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN = {**BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "rope_theta": 500000.0},
    "llama-3.1": {**LLAMA, "rope_theta": 500000.0, "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}},
    "qwen": {**QWEN, "rope_theta": 1000000.0},
    "qwen-yarn": {**QWEN, "rope_theta": 1000000.0, "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "phi": {**BASE, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "partial_rotary_factor": 0.75,
            "pad_token_id": 0},
    "deepseek": {
        **BASE, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "head_dim": None, "rope_theta": 10000,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "num_key_value_heads": 8, "kv_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "q_lora_rank": 32, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "norm_topk_prob": True, "topk_method": "noaux_tc"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"lm_head.weight": np.full((8, 8), len(made), np.float32)}, folder / "model.safetensors")
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def sglangs(folders: list[Path]) -> list[dict[str, Any]]:
    command = [sglang_python(), str(HERE / "sglang" / "namespaces.py"), *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def vllms(folder: Path, device: str, tensor_parallel: int = 1, dtype: str = "bfloat16") -> dict[str, Any]:
    """The namespace that the vLLM connector gives a model on a device, and the bytes of a block."""
    model = ModelConfig(model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype=dtype)
    spec = (
        MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=model.dtype)
        if folder.name == "deepseek"
        else FullAttentionSpec(block_size=16, num_kv_heads=4 // tensor_parallel, head_size=16, dtype=model.dtype)
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        device_config=SimpleNamespace(device_type=device),
    )
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layers.0", "layers.1"])
    found = geometry(config, SimpleNamespace(kv_cache_groups=[group]), Options(block_tokens=16))
    return {**found.namespace.to_dict(), "block_bytes": found.block_bytes}


@pytest.mark.parametrize("degree", [1, 4])
def test_a_model_has_one_namespace_in_both_engines(
    folders: list[Path], sglangs: list[dict[str, Any]], degree: int
) -> None:
    assert [vllms(folder, "cuda", degree) for folder in folders] == sglangs
    assert len({found["weights"] for found in sglangs}) == len(MODELS)
    assert {found["layout"] for found in sglangs} == {"canonical:kv_head_token_layer", "canonical:token_layer"}


def test_pages_that_vllm_packs_on_a_cpu_are_not_shared(folders: list[Path], sglangs: list[dict[str, Any]]) -> None:
    packed = vllms(folders[0], "cpu")
    assert packed["layout"].startswith("opaque:vllm-cpu:")
    assert {name for name, value in packed.items() if value != sglangs[0][name]} == {"layout"}


def test_what_cannot_be_shared_is_missed_and_explained(
    folders: list[Path], sglangs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """What vLLM stored, SGLang asks for: as namespaces of their own reading, so that `explain` can name what differs."""
    wanted = namespace(sglangs[0])
    scaled = namespace(vllms(folders[1], "cuda"))
    kept_apart = [
        (["layout"], namespace(vllms(folders[0], "cpu"))),
        (["dtype", "weights"], namespace(vllms(folders[0], "cuda", dtype="float16"))),  # cast when they are loaded
        (["rope"], replace(scaled, model=wanted.model, weights=wanted.weights)),
    ]
    with RunningNode(tmp_path) as node, PatientClient(node.socket) as client:
        keyring = client.open_namespace(wanted, sglangs[0]["block_bytes"])
        for number, (fields, stored) in enumerate(kept_apart):
            tokens = np.arange(number * 1000, number * 1000 + 2 * wanted.block_tokens, dtype="<u4")
            digests = chain_digests(tokens, wanted.block_tokens)
            keys = client.open_namespace(stored, sglangs[0]["block_bytes"]).block_keys(digests)
            client.reserve(stored, [NewBlock(keys[0], NO_PARENT, 0), NewBlock(keys[1], keys[0], 1)])
            assert len(client.commit(keys)) == 2
            assert client.lookup(keys, timeout=30).blocks == 2
            assert client.lookup(keyring.block_keys(digests), timeout=30).blocks == 0
            why = client.call("explain", 30.0, tokens=tokens.tobytes(), namespace=wanted.digest)
            assert [block["why"] for block in why["blocks"]] == ["other_namespace"] * 2
            (elsewhere,) = why["elsewhere"]
            assert elsewhere["differs"] == {name: [getattr(wanted, name), getattr(stored, name)] for name in fields}


def namespace(described: dict[str, Any]) -> Namespace:
    return Namespace.from_dict({name: value for name, value in described.items() if name != "block_bytes"})

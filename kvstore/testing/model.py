"""A small language model on disk, so that real engines can run in tests and demos without a download.

The weights are random but seeded; the tokenizer is a real byte-pair encoding trained on the caller's text. The weights are
wide (``init_range``) so that greedy output depends on the whole context: wrong KV shows in the tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHAT = "{% for m in messages %}{{m['role']}}: {{m['content']}}\n{% endfor %}assistant:"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Shape of the Llama that is made. The default has 3.5 million parameters."""

    layers: int = 4
    hidden: int = 256
    intermediate: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocabulary: int = 512
    """Upper bound: short text trains fewer tokens."""
    context: int = 16384
    init_range: float = 0.3


SMALL = ModelSize()
MEDIUM = ModelSize(layers=12, hidden=768, intermediate=2048, vocabulary=4096, init_range=0.1)
"""About 70 million parameters: prefill takes long enough on a CPU to be worth skipping."""


def make_model(folder: Path, text: Iterable[str], size: ModelSize = SMALL, seed: int = 1234) -> Path:
    """Write config, float32 safetensors and tokenizer to ``folder`` and return it. Needs torch and transformers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    transformers: Any = importlib.import_module("transformers")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=_CHAT
    ).save_pretrained(folder)

    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.context,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        initializer_range=size.init_range,
    )
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder, safe_serialization=True)
    torch.random.set_rng_state(generator_state)
    return folder

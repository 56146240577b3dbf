"""What an engine's steps ask of a GPU and of its interpreter: loops to time beside a pager's traffic."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

WARM_STEPS = 3


class Loop(ABC):
    """An engine's steps. The tokens of each are copied to the host, and those of the last but one awaited before the next: an
    engine runs one or two steps ahead of its GPU, not more."""

    def __init__(self) -> None:
        import torch

        self.sampled = torch.zeros(8, dtype=torch.int64, device="cuda")
        self.tokens = torch.zeros(8, dtype=torch.int64, pin_memory=True)
        self.stream = torch.cuda.Stream()

    @abstractmethod
    def step(self) -> None:
        """Enqueue one."""

    def seconds(self, busy: Callable[[], bool]) -> float:
        """Mean seconds of a step, stepping while ``busy`` says so."""
        import torch

        for _ in range(WARM_STEPS):
            self.step()
        steps, tokens = [], []
        while len(steps) < 2 or busy():
            self.step()
            steps.append(torch.cuda.Event(enable_timing=True))
            steps[-1].record()
            tokens.append(self._tell())
            if len(tokens) > 2:
                tokens[-3].synchronize()
        torch.cuda.synchronize()
        return steps[0].elapsed_time(steps[-1]) / 1e3 / (len(steps) - 1)

    def _tell(self) -> Any:
        """The tokens on their way to the host; the event behind them."""
        import torch

        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.tokens.copy_(self.sampled, non_blocking=True)
            return self.stream.record_event()


class Decode(Loop):
    """What one decode step of an 8B-sized model asks of a GPU: reads all weights and a KV cache, computes little."""

    LAYERS = 40

    def __init__(self) -> None:
        import torch

        super().__init__()
        self.weights = [torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(self.LAYERS)]
        self.keys = [torch.randn(8, 8, 4096, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        self.queries = torch.randn(8, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
        self.hidden = torch.randn(8, 8192, dtype=torch.bfloat16, device="cuda")

    def step(self) -> None:
        import torch

        hidden = self.hidden
        for weight in self.weights:
            hidden = hidden @ weight
            torch.nn.functional.scaled_dot_product_attention(self.queries, self.keys[0], self.keys[1])

    def captured(self) -> Decode:
        """From now on a step is one CUDA graph, as vLLM decodes unless told not to."""
        import torch

        self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.step = graph.replay  # type: ignore[method-assign]
        return self


class Prefill(Loop):
    """What a few layers of an 8B model ask of a GPU for a chunk of 8,192 tokens: much arithmetic, whose operands live in L2."""

    LAYERS = 4
    TOKENS = 8192

    def __init__(self) -> None:
        import torch

        super().__init__()

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") / 64

        shapes = (4096, 6144), (4096, 4096), (4096, 2 * 14336), (14336, 4096)
        self.layers = [[matrix(*shape) for shape in shapes] for _ in range(self.LAYERS)]
        self.hidden = matrix(self.TOKENS, 4096)

    def step(self) -> None:
        import torch

        hidden = self.hidden
        for qkv, output, up, down in self.layers:
            heads = (hidden @ qkv).view(1, self.TOKENS, 48, 128).transpose(1, 2)
            query, key, value = heads.split((32, 8, 8), 1)
            attended = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            hidden = hidden + attended.transpose(1, 2).reshape(self.TOKENS, 4096) @ output
            gate, wide = (hidden @ up).chunk(2, 1)
            hidden = hidden + (torch.nn.functional.silu(gate) * wide) @ down


class Countdown:
    """True for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def __call__(self) -> bool:
        return time.perf_counter() < self.end

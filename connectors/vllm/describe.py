"""Tells the node what prompts consist of, when the operator asked for it; off every engine thread's path.

``content_fingerprints`` sends keyed hashes of the prompt's pieces (12 bytes for about 33 tokens): who has the tenant's secret can
test whether a text that he knows is in a prompt, nobody else can, and no text can be read from them. ``preview_tokens`` sends
the first and last token ids themselves. The node keeps both in memory only.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any

from connectors.link import Link
from connectors.vllm.about import about
from connectors.vllm.keys import request_seed
from connectors.vllm.options import Options
from kvstore.errors import KVStoreError
from kvstore.node.api import About, Description
from kvstore.policy.content import pieces

logger = logging.getLogger("vllm.kvstore")

WAITING = 256
"""Prompts that may wait to be described; more are left out."""


class Describer:
    """A thread that hashes and sends. The engine's threads never wait for it."""

    def __init__(self, link: Link, content: bool, preview_tokens: int) -> None:
        self._link = link
        self._content = content
        self._preview = preview_tokens
        self._waiting: queue.Queue[tuple[About, Sequence[int]] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="kvstore-describe", daemon=True)
        self._thread.start()

    @classmethod
    def make(cls, link: Link, options: Options) -> Describer | None:
        """None when nothing was asked for."""
        if not (options.content_fingerprints or options.preview_tokens):
            return None
        return cls(link, options.content_fingerprints, options.preview_tokens)

    def tell(self, request: Any) -> None:
        """Describe a request's prompt, once it is its turn. Left out: what its tokens do not name, images and the like."""
        seed = request_seed(request)
        if seed is None or request.mm_features or not request.prompt_token_ids:
            return
        try:
            self._waiting.put_nowait((about(request, seed), request.prompt_token_ids))
        except queue.Full:
            pass

    def close(self) -> None:
        """End the thread; what waits is left out."""
        while True:
            try:
                self._waiting.put_nowait(None)
                break
            except queue.Full:
                self._waiting.get()
        self._thread.join()

    def _run(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            try:
                self._describe(*waiting)
            except KVStoreError:
                pass  # the link sees to it
            except Exception:
                logger.exception("KV store: describing a prompt failed")

    def _describe(self, request: About, prompt: Sequence[int]) -> None:
        keyring, count = self._link.keyring, self._preview
        if keyring is None:
            return
        found = pieces(prompt, keyring.secret) if self._content else None
        self._link.client.describe(
            request,
            Description(
                tokens=len(prompt),
                starts=found.starts.tobytes() if found else b"",
                hashes=found.hashes.tobytes() if found else b"",
                head=tuple(prompt[:count]),
                tail=tuple(prompt[-count:]) if count else (),
            ),
        )

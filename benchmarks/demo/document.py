"""Real text from this repository: the licence and the design, and questions on them."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent.parent.parent
_SOURCES = ("docs/design/architecture.md", "LICENSE")
_MANUALS = {
    "architecture": ("docs/design/architecture.md", "Which four things belong together here, and why?"),
    "licence": ("LICENSE", "What must be retained when a modified version of the work is distributed?"),
    "manual": ("docs/regions.md", "How does a new region come to its first blocks?"),
}

QUESTIONS = (
    "Which tiers does a block pass through on its way to the bucket, and what is checked on the way back?",
    "What must be retained when a modified version of the work is distributed?",
    "Why does the index never run ahead of the bytes? Answer in one sentence.",
)


def document() -> str:
    """About 5,000 tokens of English."""
    return "\n\n".join((_ROOT / source).read_text() for source in _SOURCES)


def prompts() -> list[str]:
    """The document with one question each: a shared prefix and a short tail."""
    text = document()
    return [f"{text}\n\nQuestion: {question}\nAnswer:" for question in QUESTIONS]


def manuals() -> dict[str, str]:
    """Prompts that share nothing, by name: each a document of 2,000 to 4,000 tokens with a question on it."""
    return {
        name: f"{(_ROOT / source).read_text()}\n\nQuestion: {question}\nAnswer:"
        for name, (source, question) in _MANUALS.items()
    }

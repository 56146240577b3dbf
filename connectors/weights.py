"""Which weights a model folder holds: part of every namespace, since a fine-tune under the same name is another model.

Reading all of a 140 GB checkpoint at each start is too slow. Its headers and 4 KiB out of the middle of every tensor are a
few megabytes, and tell any two trainings apart: training does not leave 2,000 neighbouring values of a tensor as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from functools import lru_cache
from pathlib import Path

_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100 << 20
"""The safetensors format's own bound."""


@lru_cache(maxsize=256)
def weights_digest(folder: str) -> str | None:
    """Hex digest of a model's or an adapter's configuration and weights; None when the folder has none that can be read.

    Remembered for the life of the process. Any thread.
    """
    root = Path(folder)
    try:
        files = sorted(root.glob("*.safetensors"))
        others = sorted(path for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in root.glob(pattern))
        if not files and not others:
            return None
        whole = hashlib.sha256()
        for name in ("config.json", "adapter_config.json"):
            if (root / name).is_file():
                whole.update(name.encode() + hashlib.sha256((root / name).read_bytes()).digest())
        for path in files:
            whole.update(_safetensors_digest(path))
        for path in [] if files else others:
            whole.update(_sampled_digest(path))
    except (OSError, ValueError):
        return None
    return whole.hexdigest()[:32]


def _safetensors_digest(path: Path) -> bytes:
    """Digest of the header and of a sample of every tensor. Raises ValueError when the file is not what it should be."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\x00"))
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: header of {length} bytes")
        header = file.read(length)
        digest.update(header)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for start, stop in sorted(tuple(tensor["data_offsets"]) for tensor in tensors.values()):
            middle = (start + stop) // 2 - _SAMPLE_BYTES // 2
            file.seek(8 + length + max(middle, start))
            digest.update(file.read(min(_SAMPLE_BYTES, stop - start)))
    return digest.digest()


def _sampled_digest(path: Path) -> bytes:
    """Digest of size, name and 256 samples spread over a file whose tensors we cannot tell apart."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(f"{path.name}:{size}".encode())
    with path.open("rb") as file:
        for index in range(256):
            file.seek(index * size // 256)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()

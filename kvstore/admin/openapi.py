"""The API's document, without a node to ask: ``python -m kvstore.admin.openapi docs/openapi.json``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvstore.admin.app import create_app
from kvstore.admin.server import open_site
from kvstore.config import load


def document() -> dict[str, Any]:
    """OpenAPI 3.1, of the API of a node in a region, with what other packages add."""
    with tempfile.TemporaryDirectory() as folder:
        topology = Path(folder) / "regions.toml"
        topology.write_text('[regions.local]\nurl = "s3://example/prod"\n')
        region = ["region.name=local", f"region.topology={topology}"]
        loaded = load(None, [f"node.directory={folder}", "api.listen=127.0.0.1:7070", *region], environ={})
        described: dict[str, Any] = create_app(open_site(loaded)).openapi()
    return described


def main() -> None:
    Path(sys.argv[1]).write_text(json.dumps(document(), indent=1) + "\n")


if __name__ == "__main__":
    main()

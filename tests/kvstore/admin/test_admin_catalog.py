"""The region's catalog through the API: what it holds, who is in the region, and filling it anew."""

from __future__ import annotations

import tempfile
from pathlib import Path

import httpx
from api_site import BLOCKS, TOKENS, save_chain

from kvstore.admin.client import AdminClient
from kvstore.admin.models.jobs import JobState
from kvstore.testing.admin import RunningApi
from kvstore.testing.node import RunningNode, wait_for


def test_a_catalog_is_shown_and_filled_anew() -> None:
    with tempfile.TemporaryDirectory(prefix="kvc-") as name:
        folder = Path(name)
        (folder / "bucket").mkdir()
        region = (f"object.url=file://{folder}/bucket", f"catalog.url=sqlite:///{folder}/catalog.db")
        with RunningNode(folder, *region, "policy.admission=off") as node, RunningApi(folder, *region) as api:
            save_chain(node.socket, TOKENS)
            with AdminClient(api.url) as client:
                wait_for(lambda: client.catalog().blocks == BLOCKS)
                wait_for(lambda: len(client.nodes()) == 1 and client.nodes()[0].expires is not None)
                assert client.nodes()[0].here
                epoch = client.catalog().epoch
                job = list(client.watch_job(client.run_job("catalog-rebuild").id))[-1]
                assert job.state is JobState.DONE, job.problem
                assert job.result == {"blocks": BLOCKS}
                wait_for(lambda: client.catalog().epoch != epoch)


def test_without_a_catalog_there_is_none_to_show() -> None:
    with tempfile.TemporaryDirectory(prefix="kvc-") as name, RunningApi(Path(name)) as api:
        with httpx.Client(base_url=api.url) as http:
            assert http.get("/v1/catalog").status_code == 404
            assert [node["here"] for node in http.get("/v1/nodes").json()] == [True]
            assert http.post("/v1/jobs", json={"kind": "catalog-rebuild"}).status_code == 404

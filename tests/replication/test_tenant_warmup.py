"""A node with several tenants is warmed tenant by tenant, each with its own token."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from kvstore.cli import app
from kvstore.testing.tenants import TenantSite, keys_of, prompt_of, save, tenant_site
from kvstore.tiers.base import Medium

PROMPT = prompt_of(5)


def test_each_tenant_is_warmed_with_its_own_token(tmp_path: Path) -> None:
    region = (f"object.url=file://{tmp_path}/bucket",)
    with ExitStack() as stack:
        here = stack.enter_context(tenant_site("acme", "globex", overrides=region))
        there = TenantSite(stack.enter_context(tenant_site()).folder, region, here.tokens)
        shutil.copy2(here.book.path, there.book.path)
        with here.running():
            for tenant in ("acme", "globex"):
                with here.engine(tenant) as engine:
                    assert len(save(engine, PROMPT, durable=Medium.OBJECT)) == 5
        node = stack.enter_context(there.running())
        token = tmp_path / "acme.token"
        token.write_text(there.tokens["acme"])

        def warm(*settings: str) -> tuple[dict[str, Any], str]:
            place = [f"node.socket={node.socket}", f"node.directory={node.config.node.directory}"]
            given = [part for setting in (*there.settings, *place, *settings) for part in ("--set", setting)]
            done = CliRunner().invoke(app, ["warm", "--json", *given])
            assert done.exit_code == 0, done.output
            return json.loads(done.stdout), done.stderr

        report, said = warm()
        assert (report["planned"]["blocks"], report["skipped"]) == (0, {"other_tenant": 10})
        assert "token" in said, "it says how"
        report, said = warm("identity.tenant=acme", f"node.token_file={token}")
        assert (report["blocks"], report["skipped"], said) == ({"object": 5}, {"other_tenant": 5}, "")
        with there.engine("acme") as acme, there.engine("globex") as globex:
            for engine, warm_blocks in ((acme, 5), (globex, 0)):
                keys_of(engine, PROMPT)
                tiers = {tier["medium"]: tier["blocks"] for tier in engine.call("status")["tiers"]}
                assert (tiers["host"], tiers["disk"]) == (warm_blocks, warm_blocks)

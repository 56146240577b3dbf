"""``kvstore api``."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli import options
from kvstore.cli.groups import grouped
from kvstore.cli.output import note


@grouped
def run(node: options.Node, with_node: Annotated[bool, typer.Option("--with-node", hidden=True)] = False) -> None:
    """Run the admin API of this machine's node in the foreground, until SIGINT or SIGTERM. `kvstore node` starts one itself."""
    import asyncio

    from kvstore.admin.process import node_gone
    from kvstore.admin.server import serve
    from kvstore.cli.logs import configure

    loaded = node.load()
    configure(loaded.config.node.log_level)

    async def run() -> None:
        import signal

        serving = asyncio.create_task(serve(loaded))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
        waiting = asyncio.create_task(node_gone()) if with_node else None
        if waiting is not None:
            waiting.add_done_callback(lambda _: serving.cancel())
        try:
            await serving
        except asyncio.CancelledError:
            note("The API has stopped.")

    asyncio.run(run())

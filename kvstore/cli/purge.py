"""``kvstore purge``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli import options, output, prompts
from kvstore.cli.blocks import key_of, namespace_of
from kvstore.cli.groups import grouped
from kvstore.cli.jobs import follow_job, show_job
from kvstore.cli.output import number
from kvstore.cli.overhttp import Api
from kvstore.errors import AdminRefused, ConfigError

if TYPE_CHECKING:
    from kvstore.admin.client import AdminClient
    from kvstore.admin.models.status import NamespaceInfo


@grouped
def purge(
    prompt: prompts.Named,
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="On every node and in every region, for good: a job of the API.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Delete all blocks of a model (--namespace), or those of a prompt, from a node and its region's bucket.

    Other nodes keep their copies in memory and on disk unless it is done --everywhere, which takes a model or a --key: then the
    block and all that continue it go, and no copy elsewhere brings them back. Needs an admin's token.
    """
    if not prompt.given and not prompt.namespace:
        raise ConfigError(
            "purge", "", "nothing is named", "Give --namespace, or a prompt by REQUEST, --key or --tokens."
        )
    if prompt.given and everywhere and prompt.key is None:
        raise ConfigError("--everywhere", "", "takes --namespace or --key", "See kvstore explain for the key.")
    with api.connect() as client:
        space = None if prompt.given else _space(client, prompt.namespace or "")
        what = "this prompt's blocks" if prompt.given else f"every block of {prompt.namespace}"
        if space is not None:
            what += f" ({space.model}, {space.digest[:12]})"
        if not yes:
            reach = "on every node and in every region" if everywhere else "from this node and its region's bucket"
            typer.confirm(f"Delete {what} {reach}?", abort=True, err=True)
        if everywhere:
            job = client.run_job("purge", _selector(prompt, space))
            show_job(follow_job(client, job), json)
            return
        found = client.delete_namespace(space.digest) if space else client.delete_prompt(prompt.prompt())
    words = ", ".join(f"{tier}: {number(count)} deleted" for tier, count in found.deleted.items())
    output.show(json, found, lambda: print(words))


def _space(client: AdminClient, wanted: str) -> NamespaceInfo | None:
    """The one namespace that is meant; None on a service without a node, which knows none."""
    try:
        spaces = {bytes.fromhex(space.digest): space for space in client.namespaces()}
    except AdminRefused as refused:
        if refused.status != 404:
            raise
        return None
    return spaces[namespace_of(wanted, {digest: space.model for digest, space in spaces.items()})]


def _selector(prompt: prompts.Named, space: NamespaceInfo | None) -> dict[str, str]:
    """The options of the job."""
    if prompt.key is not None:
        return {"prefix": key_of(prompt.key).hex()}
    if space is not None:
        return {"namespace": space.digest}
    wanted = prompt.namespace or ""
    return {"namespace" if re.fullmatch("[0-9a-f]{32}", wanted) else "model": wanted}

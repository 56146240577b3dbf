"""``kvstore token``: who may use the admin API."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.audit import FILE, AuditLog
from kvstore.cli import options, output
from kvstore.cli.groups import grouped
from kvstore.cli.output import ago, note, print_json, print_table
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.admin.tokens import TokenBook
    from kvstore.config import Config

app = typer.Typer(no_args_is_help=True, help="Tokens of the admin API, in the file that api.tokens names.")

Lifetime = Annotated[
    float | None, typer.Option("--days", metavar="DAYS", min=0.01, help="Valid for so long; else until revoked.")
]


@app.command()
@grouped
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is; the audit log shows it.")],
    role: Annotated[str, typer.Option(metavar="ROLE", help="viewer, operator or admin.")] = "viewer",
    days: Lifetime = None,
    tenant: Annotated[
        str, typer.Option(metavar="TENANT", help="Limit it to one tenant of the node: its blocks, prompts and pins.")
    ] = "",
    *,
    source: options.Settings,
    json: options.Json = False,
) -> None:
    """Make a token and print it; it is shown this once."""
    from kvstore.admin.auth import Role
    from kvstore.tenants.book import NAME

    if role not in list(Role):
        raise ConfigError("--role", role, "no such role", "Choose viewer, operator or admin.")
    if tenant and not re.fullmatch(NAME, tenant):
        raise ConfigError("--tenant", tenant, "not the name of a tenant", "See kvstore tenants list.")
    config = source.load().config
    token, text = _book(config).create(name, Role(role), days * 86400 if days else None, tenant)
    _record(config, "create token", token.id, name=token.name, role=token.role, tenant=token.tenant or None)
    if json:
        print_json({**token.model_dump(include={"id", "name", "role", "tenant", "expires"}), "token": text})
    else:
        print(text)
        note(f"{token.role} token {token.id} for {token.name}. It is not shown again.")


@app.command("list")
@grouped
def list_tokens(source: options.Settings, json: options.Json = False) -> None:
    """Show which tokens there are."""
    tokens = _book(source.load().config).tokens()
    if json:
        print_json([token.model_dump(exclude={"sha256"}) for token in tokens])
        return
    now = time.time()
    print_table(
        ("id", "name", "role", "tenant", ">age", "expires"),
        [
            (
                token.id,
                token.name,
                token.role,
                token.tenant or "all",
                ago(now - token.created),
                "never"
                if token.expires is None
                else "expired"
                if token.expires < now
                else f"in {ago(token.expires - now)}",
            )
            for token in tokens
        ],
    )


@app.command()
@grouped
def revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="As kvstore token list shows it.")],
    source: options.Settings,
    json: options.Json = False,
) -> None:
    """End a token at once."""
    config = source.load().config
    if not _book(config).revoke(id):
        raise ConfigError("ID", id, "no such token", "See kvstore token list.")
    _record(config, "revoke token", id)
    output.show(json, {"revoked": id}, lambda: print(f"{id} revoked"))


def _book(config: Config) -> TokenBook:
    from kvstore.admin.tokens import TokenBook

    path = config.api.tokens
    if path is None:
        raise ConfigError(
            "api.tokens", "", "no token file is configured", "Set it to a path, as /var/lib/kvstore/tokens.json."
        )
    return TokenBook(path)


def _record(config: Config, verb: str, token: str, **about: str | None) -> None:
    """A line in the audit log of the node whose settings these are; it may not have run yet."""
    with suppress(OSError):  # the log then says that it lacks a line; the token was made, and is shown
        config.node.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    entry = {"who": f"user {os.geteuid()}", "from": "command line", "pid": os.getpid(), "verb": verb, "token": token}
    AuditLog(config.node.directory / FILE).write({**entry, **about}, known=True)


@grouped
def new_key(
    source: options.Settings,
    kms: Annotated[
        str, typer.Option("--kms", metavar="KEY", help="Encrypted by this key of AWS KMS: an id, ARN or alias/name.")
    ] = "",
    json: options.Json = False,
) -> None:
    """Print a new key for encryption at rest: a line for encryption.key_file."""
    from kvstore.encryption import new_key as make
    from kvstore.kms import kms_at

    line = kms_at(source.load().config.object.region).new_line(kms) if kms else make()
    output.show(json, {"line": line}, lambda: print(line))

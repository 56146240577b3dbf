"""``kvstore tenants``."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli import options, output
from kvstore.cli.groups import grouped
from kvstore.cli.jobs import follow_job, show_job
from kvstore.cli.output import note, number, print_table, size
from kvstore.cli.overhttp import Api, given
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.admin.client import AdminClient
    from kvstore.admin.models.replication import PurgeProof
    from kvstore.admin.models.tenants import CreatedTenant, TenantInfo, TenantPurge

Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the tenant.")]
Users = Annotated[
    list[int] | None, typer.Option("--uid", metavar="UID", help="A user whose engines are the tenant's; repeatable.")
]
HostQuota = Annotated[str, typer.Option("--host", metavar="SIZE", help="Its arena; else tenants.host_bytes.")]
DiskQuota = Annotated[str, typer.Option("--disk", metavar="SIZE", help="On the disk at most; else what is fair.")]
ObjectQuota = Annotated[str, typer.Option("--object", metavar="SIZE", help="In the bucket at most, by this node.")]
SecretFile = Annotated[
    typer.FileText | None,
    typer.Option(
        "--secret-file", metavar="FILE", help="The secret that another node made, in hexadecimal; - reads it."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

POLL_SECONDS = 1.0

app = typer.Typer(
    no_args_is_help=True,
    help="The tenants of a node, through its admin API.",
    epilog="docs/tenants.md says what tenants are kept from.",
)


@app.command("list")
@grouped
def list_tenants(api: Api, json: options.Json = False) -> None:
    """Show the tenants and what they hold."""
    with api.connect() as client:
        found = list(client.tenants())
    columns = ("tenant", "users", "shares", ">clients", ">host", ">of", ">disk", ">of")
    output.show(json, found, lambda: print_table(columns, map(_row, found)))


@app.command()
@grouped
def show(name: Name, api: Api, json: options.Json = False) -> None:
    """Show one tenant."""
    with api.connect() as client:
        found = client.tenant(name)
    output.show(json, found, lambda: _print(found))


@app.command()
@grouped
def create(
    name: Name,
    uid: Users = None,
    host: HostQuota = "",
    disk: DiskQuota = "",
    bucket: ObjectQuota = "",
    shares: Annotated[str, typer.Option(metavar="NAME", help="Another tenant whose blocks it is to share.")] = "",
    secret: SecretFile = None,
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Make a tenant and print its token and its secret; they are shown this once.

    The token goes into the file that KVSTORE_NODE__TOKEN_FILE names to its engines; the secret, with --secret-file, to its other
    nodes, if they are to share blocks.
    """
    from kvstore.admin.models.tenants import NewTenant
    from kvstore.tenants.book import NAME

    if not re.fullmatch(NAME, name):
        raise ConfigError(
            "NAME", name, "not a name of letters, digits, '.', '_' and '-', at most 64", "Choose another."
        )
    quota, text = _quota(host, disk, bucket), _text(secret)
    wanted = given(NewTenant, name=name, uids=uid or [], shares=shares, quota=quota, secret=text)
    with api.connect() as client:
        made = client.create_tenant(wanted)
    output.show(json, made, lambda: _print_made(made))


@app.command("set")
@grouped
def change(
    name: Name,
    uid: Users = None,
    host: HostQuota = "",
    disk: DiskQuota = "",
    bucket: ObjectQuota = "",
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Change users or quotas: --uid in place of all users, --host, --disk or --object of that tier; "none" ends a quota."""
    from kvstore.admin.models.tenants import TenantChange

    with api.connect() as client:
        change: dict[str, Any] = {} if uid is None else {"uids": uid}
        if host or disk or bucket:
            change["quota"] = client.tenant(name).quota.model_dump() | _quota(host, disk, bucket)
        found = client.change_tenant(name, given(TenantChange, **change))
    output.show(json, found, lambda: _print(found))


@app.command()
@grouped
def rotate(
    name: Name,
    what: Annotated[str, typer.Argument(metavar="WHAT", help="secret or token.")],
    secret: SecretFile = None,
    yes: Yes = False,
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Give a tenant another secret or token and print it; it is shown this once.

    With another secret nobody asks any more for what the tenant has stored: it ages out, or goes with kvstore tenants purge.
    With another token engines that show the one before are cut off.
    """
    if what not in ("secret", "token"):
        raise typer.BadParameter("choose secret or token", param_hint="WHAT")
    if not yes:
        loss = "Every block of it becomes a miss" if what == "secret" else "Engines with the token before are cut off"
        typer.confirm(f"Rotate the {what} of {name}? {loss}.", abort=True, err=True)
    with api.connect() as client:
        if what == "secret":
            other = client.rotate_secret(name, _text(secret))
            output.show(json, other, lambda: print(other.secret))
        else:
            made = client.rotate_token(name)
            output.show(json, made, lambda: print(made.token))


@app.command()
@grouped
def remove(name: Name, yes: Yes = False, *, api: Api, json: options.Json = False) -> None:
    """End a tenant on this node. Its blocks stay until they are pushed out or purged."""
    if not yes:
        typer.confirm(f"Remove {name}? Its engines are cut off.", abort=True, err=True)
    with api.connect() as client:
        gone = client.remove_tenant(name)
    output.show(json, gone, lambda: note(f"{name} is no tenant of this node any more."))


@app.command()
@grouped
def purge(
    name: Name,
    yes: Yes = False,
    wait: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="How long to wait for other nodes and regions to confirm it."),
    ] = 60.0,
    *,
    api: Api,
    json: options.Json = False,
) -> None:
    """Delete all blocks of a tenant: on this node at once; where there is a bucket, in it, on its other nodes and in all regions.

    Shows which nodes and regions have confirmed it. The exit status is 1 when blocks are left, or not all have confirmed in time.
    """
    if not yes:
        typer.confirm(f"Delete every block of {name}, everywhere?", abort=True, err=True)
    with api.connect() as client:
        gone = client.purge_tenant(name)
        if gone.job is None:
            output.show(json, gone, lambda: print(_gone(gone)))
            raise typer.Exit(int(any(gone.left.values())))
        job = follow_job(client, client.job(gone.job))
        if job.state != "done" or job.result is None:
            show_job(job, json)
            return
        found = _awaited(client, job.result["tombstone"], wait)
    output.show(json, {**gone.model_dump(mode="json"), "proof": found}, lambda: _print_proof(found, _gone(gone)))
    raise typer.Exit(int(not found.done))


@app.command()
@grouped
def proof(
    tombstone: Annotated[str, typer.Argument(metavar="TOMBSTONE", help="As kvstore tenants purge gave it.")],
    api: Api,
    json: options.Json = False,
) -> None:
    """Show which nodes and regions have carried a purge out, and what is left. The exit status is 1 until all have."""
    if not re.fullmatch("[0-9a-f]{32}", tombstone):
        raise ConfigError("TOMBSTONE", tombstone, "not 32 hexadecimal digits", "Copy it from kvstore tenants purge.")
    with api.connect() as client:
        found = client.purge_proof(tombstone)
    output.show(json, found, lambda: _print_proof(found))
    raise typer.Exit(int(not found.done))


def _awaited(client: AdminClient, tombstone: str, seconds: float) -> PurgeProof:
    """The proof once it is complete, or what there is of it when the time is up."""
    deadline = time.monotonic() + seconds
    while True:
        found = client.purge_proof(tombstone)
        if found.done or time.monotonic() >= deadline:
            return found
        time.sleep(POLL_SECONDS)


def _row(tenant: TenantInfo) -> tuple[str, ...]:
    tiers = {tier.medium.value: tier for tier in tenant.tiers}
    room = [
        size(getattr(tiers[medium], field)) if medium in tiers else "-"
        for medium in ("host", "disk")
        for field in ("used_bytes", "capacity_bytes")
    ]
    served = number(tenant.clients) if tenant.served else "not served"
    users = ", ".join(map(str, tenant.uids)) or "-"
    return tenant.name, users, tenant.shares or "-", served, *room


def _print(tenant: TenantInfo) -> None:
    state = f"{number(tenant.clients)} clients" if tenant.served else "not served"
    print(f"{tenant.name}: {state}" + (f", shares the blocks of {tenant.shares}" if tenant.shares else ""))
    print(f"users: {', '.join(map(str, tenant.uids)) or 'none; by token only'}")
    rows = [
        (tier.medium.value, number(tier.blocks), size(tier.used_bytes), size(tier.capacity_bytes),
         number(tier.evicted), number(tier.refused))
        for tier in tenant.tiers
    ]  # fmt: skip
    print_table(("tier", ">blocks", ">used", ">of", ">evicted", ">refused"), rows)


def _print_made(made: CreatedTenant) -> None:
    print(f"token {made.token}")
    if made.secret:
        print(f"secret {made.secret}")
    note("They are not shown again.")


def _gone(gone: TenantPurge) -> str:
    words = ", ".join(f"{tier.value}: {number(count)} deleted" for tier, count in gone.deleted.items())
    return f"{words or 'nothing was here'}; {number(sum(gone.left.values()))} left"


def _print_proof(found: PurgeProof, here: str = "") -> None:
    print(f"purge {found.tombstone}: {'done everywhere' if found.done else 'not yet done everywhere'}")
    if here:
        print(f"this node: {here}")
    rows = []
    for region, state in found.regions.items():
        left = "-" if state.left is None else number(state.left)
        confirmed = [f"{one.node} {datetime.fromtimestamp(one.time, UTC):%Y-%m-%d %H:%M:%S}Z" for one in state.receipts]
        remark = state.problem or (f"waiting for {', '.join(state.waiting)}" if state.waiting else "")
        rows.append((region, "yes" if state.known else "no", left, ", ".join(confirmed) or "-", remark or "-"))
    print_table(("region", "tombstone", ">blocks left", "confirmed by", "remark"), rows)


def _quota(host: str, disk: str, bucket: str) -> dict[str, int | None]:
    """Those that were given. Raises ConfigError."""
    given = {"host": ("--host", host), "disk": ("--disk", disk), "object": ("--object", bucket)}
    return {tier: None if text == "none" else options.size(name, text) for tier, (name, text) in given.items() if text}


def _text(file: typer.FileText | None) -> str:
    return "" if file is None else file.read(4096).strip().lower()

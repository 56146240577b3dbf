"""The admin API, as commands reach it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kvstore.cli import options
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.admin.client import AdminClient

T = TypeVar("T")

TOKEN = "KVSTORE_API_TOKEN"
AUTHORITY, CERTIFICATE = "KVSTORE_API_CA", "KVSTORE_API_CERTIFICATE"

Url = Annotated[str, typer.Option("--api", metavar="URL", help="The admin API; else api.listen.", envvar="KVSTORE_API")]


@dataclass(frozen=True, slots=True)
class Api:
    """The API of a node or of a region's service, and the settings that say where it is."""

    api: Url = ""
    config: options.ConfigFile = None
    overrides: options.Overrides = None

    @contextmanager
    def connect(self) -> Iterator[AdminClient]:
        """A client of it, with the token in KVSTORE_API_TOKEN and the files that KVSTORE_API_CA and KVSTORE_API_CERTIFICATE name.

        Raises ConfigError, and NodeUnavailable on first use.
        """
        settings = options.load(self.config, self.overrides).config.api
        if not self.api and not settings.listen:
            remedy = "Set it to 127.0.0.1:7070, or give --api."
            raise ConfigError("api.listen", "", "no admin API is configured", remedy)
        if self.api and not re.fullmatch(r"https?://[^\s?#@]+", self.api):
            raise ConfigError("--api", self.api, "not the address of an API", "Write it as http://127.0.0.1:7070.")
        from kvstore.admin.client import AdminClient
        from kvstore.admin.tls import towards_api

        url, token = self.api or settings.url, os.environ.get(TOKEN, "")
        tls = towards_api(os.environ.get(AUTHORITY, ""), os.environ.get(CERTIFICATE, ""))
        with AdminClient(url, token, tls=tls) as client:
            yield client


def given(kind: type[T], /, **fields: Any) -> T:
    """A request of the API from what somebody typed. Raises ConfigError."""
    from pydantic import ValidationError

    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"])) or kind.__name__
        value = "" if name == "secret" else str(first["input"])[:100]
        raise ConfigError(name, value, first["msg"], "See --help.") from None

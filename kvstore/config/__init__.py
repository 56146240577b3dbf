"""The one configuration object: a few typed keys in sections, and where each value came from.

Four sources, later ones win: the defaults, a TOML file, the environment (``KVSTORE_HOST__BYTES=16GiB`` sets ``host.bytes``),
and command-line ``--set host.bytes=16GiB``. A key nobody knows or a value that cannot work is refused with a ConfigError
that names the field, the value and the remedy.

    schema.py    the settings
    sources.py   file, environment and flags; who set what
"""

from kvstore.config.schema import Config, default_socket
from kvstore.config.sources import Loaded, Setting, fields, load

__all__ = ["Config", "Loaded", "Setting", "default_socket", "fields", "load"]

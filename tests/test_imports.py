"""Who may import whom. The folder tree is the architecture, so its rules are checked on the syntax tree of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FORBIDDEN = {
    "kvstore": {"connectors", "replication", "benchmarks", "tests", "vllm", "sglang", "lmcache", "cupy"},
    "connectors": {"replication", "benchmarks", "tests"},
    "replication": {"connectors", "benchmarks", "tests", "torch", "cupy", "vllm", "sglang"},
}
"""Top-level packages that a package must not import, anywhere in it."""

CLIENT_SIDE = {
    "kvstore", "kvstore.config", "kvstore.envelope", "kvstore.errors", "kvstore.identity", "kvstore.layout",
    "kvstore.node.api", "kvstore.node.arena", "kvstore.node.client", "kvstore.node.launch", "kvstore.node.straight",
    "kvstore.policy", "kvstore.tiers.base", "kvstore.tracing",
}  # fmt: skip
"""What connectors may use of kvstore: nothing of it does storage work in the engine's process, but to read what is asked for."""

HEAVY = {"torch", "cupy", "vllm", "transformers", "boto3", "obstore"}


def modules(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything that a module imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_downwards(package: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imports(path)
        if name.split(".")[0] in FORBIDDEN[package]
    }
    assert not wrong


def test_connectors_use_only_the_client_side() -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules("connectors")
        for name in imports(path)
        if name.split(".")[0] == "kvstore"
        and name not in CLIENT_SIDE
        and not any(name.startswith(allowed + ".") for allowed in ("kvstore.policy", "kvstore.config"))
    }
    assert not wrong


def test_torch_stays_in_the_testing_package() -> None:
    wrong = {
        str(path.relative_to(ROOT))
        for path in modules("kvstore")
        if "testing" not in path.parts and any(name.split(".")[0] == "torch" for name in imports(path))
    }
    assert not wrong


@pytest.mark.parametrize(
    "statement",
    [
        "import kvstore",
        "import kvstore.cli",
        "import kvstore.config",
        "import kvstore.node.client",
        "import kvstore.node.server",
    ],
)
def test_the_package_starts_light(statement: str) -> None:
    code = f"{statement}; import sys; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['kvstore', '--help']\n"
        "from kvstore.cli import main\n"
        "try: main()\n"
        f"except SystemExit: print('loaded', *sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded"

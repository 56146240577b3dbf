"""The documentation is held to the code: generated parts are current, links lead somewhere, commands and settings exist."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from kvstore.cli import app
from kvstore.config import load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", ["configuration.md", "cli.md", "../README.md"])
def test_generated_parts_are_current(generate: ModuleType, file: str) -> None:
    assert (ROOT / "docs" / file).read_text() == generate.render(file), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Those of ours that a page shows, without what the shell makes of the rest of the line."""
    lines = [line for text in fences(page, "(?:bash|console|sh)?") for line in text.replace("\\\n", " ").splitlines()]
    shown = [match[1] for line in lines if (match := re.match(r"\s*(?:\$ )?kvstore (.*)", line))]
    return [re.split(r"\s#\s|\s&(?:\s|$)|[|;>)]|&&", text)[0] for text in shown]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page: Path) -> None:
    for text in commands(page):
        command, words = get_command(app), shlex.split(text)
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, text
            command = command.commands[words.pop(0)]
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        given = {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)}
        assert given <= known | {"--help"}, text


def test_pages_show_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30, "or the test above looks at nothing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configurations_are_accepted(page: Path, tmp_path: Path) -> None:
    region = [f"object.url=file://{tmp_path}", f"region.topology={ROOT / 'docs' / 'regions.toml'}", "region.name=eu"]
    for text in fences(page, "toml"):
        (tmp_path / "node.toml").write_text(text)
        load(tmp_path / "node.toml", region if "[remote]" in text else [], environ={})

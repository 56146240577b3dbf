"""``python -m benchmarks <study> [--json] [--save]``: run a study; exit status 1 when a target is missed."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys

from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks.study import Study, judge, report, save


def find(name: str) -> Study:
    module = importlib.import_module(f"benchmarks.{name}")
    study: Study = module.STUDY
    return study


def names() -> list[str]:
    """Modules and packages of this package that offer a study."""
    helpers = {"study", "micros", "__main__", "results", "common"}
    return sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in helpers)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("study", choices=names(), metavar="study", help=", ".join(names()))
    parser.add_argument("--json", action="store_true", help="print only one JSON line, last, on standard output")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        parser.parse_args()
    study = find(sys.argv[1])
    if study.arguments:
        study.arguments(parser)
    args = parser.parse_args()

    figures = study.run(args)
    result = report(
        study, figures, command="python -m benchmarks " + " ".join(a for a in sys.argv[1:] if a != "--save")
    )
    console = Console(stderr=True)
    verdicts = judge(figures, study.targets)
    table = Table("figure", "value", "target", title=study.summary, title_justify="left")
    for name, value in result["figures"].items():
        mark = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[verdicts.get(name)]
        table.add_row(name, f"{value:g}", f"{study.targets.get(name, '')} {mark}")
    console.print(table)
    if args.save:
        console.print(f"kept in {save(result)}")
    if args.json:
        print(json.dumps(result), flush=True)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())

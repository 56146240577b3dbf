"""The main job, end to end, on this machine: prefill once, and never again, whatever is restarted.

document.py   the prompts: a long shared document and questions on it
services.py   an S3 server, the node, engines: processes that can be stopped and started again
story.py      what is asked, restarted and emptied in which order
__main__.py   ``python -m benchmarks.demo``: progress, then a table
regions.py    ``python -m benchmarks.demo.regions``: the same for a region that is born
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.study import Study


def run(args: Any) -> Mapping[str, float]:
    from benchmarks.demo.story import figures, tell

    return figures(tell())


STUDY = Study(
    name="demo",
    summary="Time to first token of a long shared prompt: computed, and loaded from each tier",
    run=run,
    targets={"identical": ">=1", "speedup_host": ">=3", "speedup_disk": ">=3", "speedup_object": ">=3"},
)

"""The demos keep their promises, with a smaller model than ``make demo`` and ``make demo-regions`` use."""

import pytest

from benchmarks.demo import regions
from benchmarks.demo.story import COMPUTED, tell
from kvstore.testing.model import ModelSize

pytestmark = [pytest.mark.engine, pytest.mark.s3, pytest.mark.timeout(900)]


def test_a_prompt_is_computed_once_and_then_comes_from_the_nearest_tier_that_is_left() -> None:
    answers = tell(size=ModelSize(vocabulary=4096))
    assert [answer.source for answer in answers] == [
        *(COMPUTED, "host", "host"),
        *("host", "host", "host"),
        *("disk", "host", "host"),
        *("object", "host", "host"),
    ]
    assert all(answer.identical for answer in answers)
    assert all(answer.loaded_tokens > 0.9 * answer.prompt_tokens for answer in answers if answer.source != COMPUTED)


def test_a_region_that_is_born_computes_nothing_that_another_has_computed(capsys: pytest.CaptureFixture[str]) -> None:
    birth = regions.tell(size=ModelSize(vocabulary=4096))
    assert birth.kept
    blocks = sum(answer.loaded_tokens for answer in birth.answers) // 64
    assert birth.blocks >= blocks
    assert birth.wan_bytes > 0
    regions.show(birth)
    assert capsys.readouterr().out.count(" yes ") == len(birth.answers)
    assert f"{len(birth.answers)} of {len(birth.answers)} answers" in regions.sentence(birth)

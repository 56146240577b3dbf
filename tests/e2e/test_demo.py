"""The demo keeps its promises, with a smaller model than ``make demo`` uses."""

import pytest

from benchmarks.demo.story import COMPUTED, tell
from kvstore.testing.model import ModelSize


@pytest.mark.engine
@pytest.mark.s3
@pytest.mark.timeout(900)
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

"""Whether promises are kept is counted of all that is promised."""

import numpy as np

from benchmarks.guarantee import Losses, judge


def test_a_risk_that_is_kept_by_answering_nothing_counts_as_kept() -> None:
    """Of 200 frames all pixels are as unsure as the first step has it, and a tenth of them wrong: more than 0.05."""
    num, none_N2KT = 200, np.zeros((200, 2, 2, 32), np.int64)
    losses = Losses(
        tuple(map(str, range(num))), np.full((num, 5), 0.1), np.ones((num, 5)), none_N2KT,
        np.linspace(0.1, 0.7, 5, dtype=np.float32),
    )  # fmt: skip
    found = judge(losses, np.arange(100), losses, np.arange(100, 200))
    assert found["0.05"] == [0.0, 0.0]

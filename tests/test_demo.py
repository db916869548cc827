"""What the demo says of its own result."""

import pytest

from taid.demo import Result, verdict


def result(name, cross_entropy, closed):
    return Result(name, cross_entropy, 0.0, 0.0, closed, None, "")


@pytest.mark.parametrize(
    ("taid", "words"),
    [
        (4.779, "TAID did not win this one: forward KL is ahead by less than one seed can tell, 0.012 nats."),
        (4.867, "TAID did not win this one: forward KL is ahead, 0.100 nats."),
        (4.700, "TAID 31%, forward KL 29% was closed."),
    ],
)
def test_the_verdict_names_the_winner_and_by_how_much(taid, words):
    results = [result("student before", 5.65, None), result("forward KL", 4.767, 0.29), result("TAID", taid, 0.31)]
    assert verdict(results).endswith(words)

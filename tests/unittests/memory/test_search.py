"""Search for the largest number whose memory is within a limit."""

import math
import random

import pytest

from sb_memeff.memory.search import DoesNotFit, largest

MOST = 500


class Peak:
    """A function that remembers what it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, n):
        assert n not in self.asked
        self.asked.append(n)
        return self.function(n)


def straight(rng):
    a, b = rng.randrange(1000), rng.uniform(0, 20)
    return lambda n: int(a + b * n)


def quadratic(rng):
    a, b, c = rng.randrange(1000), rng.uniform(0, 5), rng.uniform(0, 0.2)
    return lambda n: int(a + b * n + c * n * n)


def stepped(rng):
    a, height, width = (rng.randrange(1, 300) for _ in range(3))
    return lambda n: a + height * (n // width)


def flat_at_first(rng):
    a, bend, b = rng.randrange(1000), rng.randrange(MOST), rng.randrange(1, 50)
    return lambda n: a + b * max(n - bend, 0)


def any_growth(rng):
    peaks = [rng.randrange(1000)]
    for _ in range(MOST):
        peaks.append(peaks[-1] + rng.choice((0, 0, 1, 5, 1000)))
    return peaks.__getitem__


@pytest.mark.parametrize(
    "kind", [straight, quadratic, stepped, flat_at_first, any_growth]
)
def test_largest_is_what_trying_all_finds(kind):
    rng = random.Random(0)
    inside = 0
    for _ in range(400):
        peak = Peak(kind(rng))
        first = rng.randrange(20)
        most = rng.randrange(first, MOST)
        low, high = peak.function(first), peak.function(most)
        limit = rng.randrange(low, low + int(1.2 * (high - low)) + 2)
        expected = max(
            n for n in range(first, most + 1) if peak.function(n) <= limit
        )
        assert largest(peak, limit, first, most) == (
            expected,
            peak.function(expected),
        )
        assert all(first <= n <= most for n in peak.asked)
        # At the latest the fourth step halves what is left, or doubles.
        assert len(peak.asked) <= 3 + 2 * math.ceil(2 * math.log2(MOST))
        inside += first < expected < most
    assert inside > 20


def test_a_straight_line_takes_few_steps():
    rng = random.Random(0)
    for _ in range(1000):
        a, b = rng.randrange(10**9), rng.randrange(1, 10**8)
        first = rng.randrange(1, 5)
        limit = rng.randrange(a + b * first, 4 * 10**10)
        peak = Peak(lambda n, a=a, b=b: a + b * n)
        found, _ = largest(peak, limit, first)
        assert found == min((limit - a) // b, 2**20)
        assert len(peak.asked) <= 5


def test_estimates_predict_the_answer_and_do_not_decide_it():
    rng = random.Random(0)
    for kind in (straight, quadratic, stepped, any_growth):
        for error in (0, 0.1, 10):
            for _ in range(100):
                peak = Peak(kind(rng))
                peaks = [peak.function(n) for n in range(MOST + 1)]
                limit = rng.randrange(peaks[1], peaks[-1] + 2)
                about = {
                    n: peaks[n] * rng.uniform(1 - error, 1 + error)
                    for n in rng.sample(range(MOST), rng.randrange(1, 4))
                }
                found = largest(peak, limit, 1, MOST, about)
                assert found[0] == max(
                    n for n in range(1, MOST + 1) if peaks[n] <= limit
                )
                assert found[1] == peaks[found[0]]
                assert len(peak.asked) <= 3 + 2 * math.ceil(2 * math.log2(MOST))
                if kind is straight and not error and len(about) > 1:
                    # The answer, the next number, and one more if the slope is rounded.
                    assert len(peak.asked) <= 4


def test_a_wrong_estimate_next_to_the_answer_does_not_stop_bisection():
    """Peaks above the limit are equal, so that lines predict little progress."""
    peak = Peak(lambda n: 0 if n == 1 else 1001)
    about = {2: 10**12, 1000: 1000}
    assert largest(peak, 1000, about=about) == (1, 0)
    assert len(peak.asked) <= 10


def test_without_a_limit_the_largest_number_is_found():
    peak = Peak(lambda n: 7)
    assert largest(peak, 7) == (2**20, 7)
    assert len(peak.asked) <= 2 * 20 + 1
    assert largest(lambda n: n, 10, first=3, most=3) == (3, 3)


def test_the_first_does_not_fit():
    peak = Peak(lambda n: 100 * n)
    with pytest.raises(DoesNotFit, match="It takes 200 bytes") as caught:
        largest(peak, 199, first=2)
    assert caught.value.peak == 200
    assert peak.asked == [2]

"""The batches of a data set that exceed a budget."""

import pytest

from sb_memeff.analysis.durations import LoaderBatch
from sb_memeff.analysis.oversized import find_oversized

# As a sampler makes them: about 100 s each, and a few long utterances.
BATCHES = [
    LoaderBatch(max(int(100 / seconds), 1), seconds, f"u{seconds}")
    for seconds in [162.0, 140.5, 130.0, *(60 / 1.1**i for i in range(40))]
]


def peak(count, seconds):
    return int(5000 + count * (40 + 100 * seconds + 1.5 * seconds**2))


def bump(count, seconds):
    """Not quite as predicted."""
    return int(peak(count, seconds) * (1 + 0.01 * (count % 3)))


@pytest.mark.parametrize("cost", [peak, bump])
@pytest.mark.parametrize("limit", [0, 12_000, 20_000, 30_000, 45_000, 10**6])
def test_what_exceeds_a_limit(cost, limit):
    measured = []

    def measure(count, seconds):
        measured.append((count, seconds))
        return cost(count, seconds)

    found = find_oversized(BATCHES, measure, limit)
    expected = {b for b in BATCHES if cost(b.utterances, b.seconds) > limit}
    assert set(found.oversized) == expected
    assert (found.batches, found.limit) == (len(BATCHES), limit)
    # Each is measured once, and few of them.
    assert len(measured) == len(set(measured)) <= 12
    for batch, size in found.listed:
        assert size == cost(batch.utterances, batch.seconds)
        assert (size > limit) == bool(expected)


def test_the_text():
    found = find_oversized(BATCHES, peak, 30_000)
    head, titles, *rows = str(found).splitlines()
    assert head == (
        f"Too large for 30.0 kB: {len(found.oversized)} of 43 batches, with "
        f"utterances of 130 s or more. The largest:"
    )
    assert titles.split() == [
        "utterances",
        "seconds",
        "peak",
        "longest",
        "utterance",
    ]
    assert rows[0].split() == ["1", "162", "60.6", "kB", "u162.0"]
    assert len(rows) == 3
    fits = str(find_oversized(BATCHES, peak, 10**6)).splitlines()
    assert fits[0] == "All 43 batches fit into 1.00 MB. The largest:"
    assert fits[2] == rows[0] and len(fits) == 3

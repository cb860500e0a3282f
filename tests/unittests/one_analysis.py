"""Several analyses as one: all objects of the process are looked at once.

That takes a second, which is more than to analyse a small network. Import
``one_analysis`` into a module of tests.

Authors
 * The sb_memeff authors 2026
"""

import pytest

from sb_memeff.memory.leftovers import no_leftovers


@pytest.fixture(scope="module")
def one_analysis():
    """Each analysis still puts back what it leaves in what was there before."""
    with no_leftovers():
        yield

"""Random configurations: how many, and what a refusal must look like.

A test tries the same few each time. More, and other ones each time, by hand:

    SB_MEMEFF_EXAMPLES=2000 pytest -k random

Authors
 * The sb_memeff authors 2026
"""

import linecache
import os
import traceback
from pathlib import Path

import hypothesis
import torch
from hypothesis import strategies as st
from speechbrain.utils import importutils

import sb_memeff

# Hypothesis asks each module for its file. SpeechBrain's lazy modules would be
# loaded by the question, and some of them need other packages.
importutils.LazyModule.__file__ = importutils.__file__

PACKAGE = Path(sb_memeff.__file__).parent
SWITCH = "SB_MEMEFF_EXAMPLES"

# Text from a yaml file, truth values, fractions: none of them counts anything.
NOT_COUNTS = (True, False, "2", "no", 1.5, None, -1, [2], float("nan"))
# Neither True nor False.
NOT_SWITCHES = ("no", "off", "False", None, 2, 0.5, [])


def examples(number):
    """Settings of a test that tries so many configurations in CI."""
    chosen = os.environ.get(SWITCH)
    return hypothesis.settings(
        max_examples=int(chosen or number),
        deadline=None,
        derandomize=chosen is None,
        database=None,
        print_blob=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def assert_ours(error, *parts):
    """An error is raised by a statement of ours, and names the value."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename}:{last.lineno}: {error!r}"
    line = linecache.getline(last.filename, last.lineno).strip()
    assert Path(last.filename).is_relative_to(PACKAGE), where
    assert line.startswith("raise "), f"{where} in {line!r}"
    for part in parts:
        assert part in str(error), f"{part!r} is not in {error}"


def tensor(shape, seed, dtype=torch.float64, scale=1.0):
    """Normal numbers, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * scale).to(dtype)


LAYOUTS = ("contiguous", "permuted", "slice", "reversed storage", "expanded")
layouts = st.sampled_from(LAYOUTS)


def laid_out(x, layout):
    """The same values (of the first row, if expanded) with other strides."""
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "slice":
        wide = torch.full(
            (*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype
        )
        return wide[..., 1::2].copy_(x)
    if layout == "reversed storage":
        order = range(x.dim())[::-1]
        return x.permute(*order).contiguous().permute(*order)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x

"""The formats that are compared are those of the package and of bitsandbytes.

Authors
 * The sb_memeff authors 2026
"""

import torch
from state_formats import displacements, formats, staleness


def test_formats_written_here_are_those_of_the_libraries():
    found = formats()
    torch.manual_seed(0)
    x = torch.randn(4096) * torch.randn(4096).exp()
    # bitsandbytes does not always find the nearest code.
    for name, other, most in (
        ("sb_memeff", "dynamic tree, 256", 0),
        ("bitsandbytes", "torchao 8-bit", 0.01),
    ):
        ours, theirs = (found[n].first(x) for n in (name, other))
        differ = (ours - theirs).abs() > 1e-6 * theirs.abs()
        assert differ.float().mean() <= most
    ways = [
        displacements(found[n], sigma=1, steps=20)[0]
        for n in ("32 bits", "sb_memeff", "sb_memeff, magnitudes")
    ]
    exact, *errors = ways
    signed, magnitudes = ((way - exact).norm() for way in errors)
    assert 0 < signed < magnitudes


def test_limit_of_bytes_and_staleness_in_32_bits():
    found = formats()
    assert staleness(found["32 bits"]) < 0.02
    for name, form in found.items():
        assert form.bytes_per_value <= 1.07 or name == "32 bits"

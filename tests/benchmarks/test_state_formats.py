"""The formats that are compared are those of the package and of bitsandbytes.

Authors
 * The sb_memeff authors 2026
"""

import torch
from state_formats import displacements, formats, way_without_gradient


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


def test_errors_that_are_repaid_do_not_add_up():
    found = formats()
    exact, ours, theirs = (
        displacements(found[n], sigma=1, steps=200)[0]
        for n in ("32 bits", "sb_memeff", "dynamic tree, 256")
    )
    assert 0 < (ours - exact).norm() < 0.25 * (theirs - exact).norm()
    exact, ours, theirs = (
        way_without_gradient(found[n])
        for n in ("32 bits", "sb_memeff", "dynamic tree, 256")
    )
    assert (ours - exact).norm() < 0.05 * exact.norm()
    assert (theirs - exact).norm() > exact.norm()


def test_limit_of_bytes():
    for name, form in formats().items():
        assert form.bytes_per_value <= 1.07 or name == "32 bits"

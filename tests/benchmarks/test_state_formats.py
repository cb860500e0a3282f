"""The formats that are compared are those of the package and of bitsandbytes.

Authors
 * The sb_memeff authors 2026
"""

import torch
from state_formats import Task, displacements, formats, way_without_gradient


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


def test_our_second_moment_is_dithered_as_here():
    found = formats()
    torch.manual_seed(0)
    x = torch.randn(4096).exp()
    for step in (1, 1000):
        ours, here, nearest = (
            found[name].second(x, step)
            for name in (
                "sb_memeff",
                "dynamic tree, 256, corrected",
                "dynamic tree, 256",
            )
        )
        torch.testing.assert_close(ours, here, rtol=1e-6, atol=0)
        assert ((ours - nearest).abs() > 1e-6 * x).float().mean() > 0.2


def test_corrected_errors_do_not_add_up():
    found = [
        formats()[name]
        for name in ("32 bits", "sb_memeff", "dynamic tree, 256")
    ]
    task = Task(1, steps=200)
    exact, ours, theirs = (displacements(form, task)[0] for form in found)
    assert 0 < (ours - exact).norm() < 0.25 * (theirs - exact).norm()
    exact, ours, theirs = map(way_without_gradient, found)
    assert (ours - exact).norm() < 0.5 * exact.norm()
    assert (theirs - exact).norm() > exact.norm()
    task = Task(0, drift=2, steps=1000)
    exact, ours, theirs = (displacements(form, task)[1] for form in found)
    assert 0 < (ours - exact).norm() < 0.4 * (theirs - exact).norm()


def test_limit_of_bytes():
    for name, form in formats().items():
        assert form.bytes_per_value <= 1.07 or name == "32 bits"

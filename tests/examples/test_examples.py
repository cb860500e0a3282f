"""The examples run and show what they say."""

import importlib.util
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2] / "examples"


def run(name, *args):
    """Runs an example's main()."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(*args)


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals()}
    assert {path.stem for path in FOLDER.glob("*.py")} <= tested


def test_reversible_network():
    report = run("reversible_network")
    assert report.inversion_error == 0
    assert report.gradient_error < 1e-5


def test_recompute_any_network():
    assert run("recompute_any_network")


def test_transducer_loss():
    gradients = run("transducer_loss")
    for method in ("samplewise", "tiled"):
        torch.testing.assert_close(gradients[method], gradients["batched"])


def test_eight_bit_optimizer():
    found = run("eight_bit_optimizer")
    torch_loss, torch_bytes = found["AdamW"]
    loss, size = found["AdamW8bit"]
    assert size < 0.27 * torch_bytes
    assert loss < max(1e-4, 3 * torch_loss)


def test_what_fits():
    assert run("what_fits", "0.15GB") == 4

"""Settings that are no switches, and no numbers.

Authors
 * The sb_memeff authors 2026
"""

import importlib
import inspect
import pkgutil

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

import sb_memeff.lobes.models
from sb_memeff.nnet.angular_margin import InterTopKMargin
from sb_memeff.nnet.recompute import recompute_blocks
from sb_memeff.nnet.reversible import ReversibleSequence
from sb_memeff.nnet.transducer_loss import transducer_loss

YAML = """
recompute: False
net: !new:torch.nn.Sequential
    - !new:torch.nn.ReLU
__recompute: !apply:sb_memeff.nnet.recompute.recompute_blocks
    module: !ref <net>
    blocks: "*"
    enabled: !ref <recompute>
"""


@pytest.mark.parametrize("value", ["no", "off", "false", None, 2, 0.0, []])
@pytest.mark.parametrize(
    "name, use",
    [
        (
            name,
            lambda **switch: recompute_blocks(
                torch.nn.Sequential(torch.nn.ReLU()), "*", **switch
            ),
        )
        for name in ("enabled", "first_output_only")
    ]
    + [
        (name, lambda **switch: ReversibleSequence([torch.nn.ReLU()], **switch))
        for name in ("save_memory", "exact")
    ]
    + [
        (
            "overwrite_logits",
            lambda **switch: transducer_loss(
                torch.zeros(1, 2, 2, 4),
                torch.tensor([[3]]),
                torch.ones(1),
                torch.ones(1),
                0,
                **switch,
            ),
        )
    ],
)
def test_a_switch_that_is_no_switch_is_named(name, use, value):
    with pytest.raises(TypeError, match=f"{name}=.* must be True or False"):
        use(**{name: value})
    for good in (True, False, 1, 0):
        use(**{name: good})


def lobes():
    """Each class of the lobes with each of its switches."""
    package = sb_memeff.lobes.models
    for _, name, _ in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{name}")
        for kind in (getattr(module, name) for name in module.__all__):
            parameters = [*inspect.signature(kind).parameters.values()]
            if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
                # Those of SpeechBrain's class.
                base = inspect.signature(kind.__mro__[1])
                parameters += base.parameters.values()
            switches = {
                p.name for p in parameters if isinstance(p.default, bool)
            }
            yield from ((kind, switch) for switch in sorted(switches))


@pytest.mark.parametrize("value", ["no", None])
@pytest.mark.parametrize(
    "kind, name", [*lobes(), (InterTopKMargin, "easy_margin")]
)
def test_constructors_name_a_switch(kind, name, value):
    options = {"input_size": 20} if kind is not InterTopKMargin else {}
    with pytest.raises(TypeError, match=f"{name}=.* must be True or False"):
        kind(**{name: value}, **options)


def test_lobes_are_found():
    assert len({kind for kind, _ in lobes()}) >= 4


def test_no_in_a_yaml_file_is_text():
    with pytest.raises(TypeError, match="enabled='no'"):
        load_hyperpyyaml(YAML.replace("False", "no"))
    with pytest.raises(TypeError, match="enabled='no'"):
        load_hyperpyyaml(YAML, {"recompute": "no"})
    load_hyperpyyaml(YAML)  # nothing is recomputed

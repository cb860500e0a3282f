"""Switches that are neither True nor False.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

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


def test_no_in_a_yaml_file_is_text():
    with pytest.raises(TypeError, match="enabled='no'"):
        load_hyperpyyaml(YAML.replace("False", "no"))
    with pytest.raises(TypeError, match="enabled='no'"):
        load_hyperpyyaml(YAML, {"recompute": "no"})
    load_hyperpyyaml(YAML)  # nothing is recomputed

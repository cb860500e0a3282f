"""How often a step of the losses lets the host wait for a GPU.

Counted on the CPU, with its comparison of backward with forward left out: on a
GPU that is read later, when it has arrived.
"""

import pytest
import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.nnet.transducer_loss import joint_loss, transducer_loss
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from tests.unittests.host_waits import HostWaits

B, T, U, H, V = 5, 9, 4, 6, 7


class Joint(nn.Module):
    """With dropout."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, enc, pred):
        return self.dropout(torch.relu(enc + pred))


@pytest.fixture(autouse=True)
def later(monkeypatch):
    monkeypatch.setattr(
        "sb_memeff.nnet.transducer_loss.cells.report_mismatches",
        lambda *args: None,
    )


def batch():
    torch.manual_seed(0)
    enc, pred = torch.randn(B, T, H), torch.randn(B, U + 1, H)
    lengths = torch.linspace(0.5, 1, B)
    targets = torch.randint(1, V, (B, U))
    return (
        enc.requires_grad_(),
        pred.requires_grad_(),
        targets,
        lengths,
        lengths,
    )


def waits(joint, **options):
    loss = TransducerJointLoss(joint, nn.Linear(H, V), **options)
    inputs = batch()
    with HostWaits() as found:
        loss(*inputs).sum().backward()
    return found.count


@pytest.mark.parametrize("reduction", ["nll_sum", "nll"])
@pytest.mark.parametrize("method", ["tiled", "samplewise"])
@pytest.mark.parametrize("joint", [Transducer_joint, Joint])
def test_twice_in_a_step(joint, method, reduction):
    """Lengths; then losses, and with them the cells that paths visit.

    Where samples have weights of their own backward reads them once more.
    """
    count = waits(joint(), method=method, reduction=reduction, max_rows=16)
    assert count == (2 if reduction == "nll_sum" else 3)


def test_one_more_for_each_further_run_of_samples(monkeypatch):
    monkeypatch.setattr(joint_loss, "GROUP_CELLS", 2 * T * (U + 1))
    assert waits(Transducer_joint(), max_rows=16) == 1 + 3


def test_one_for_logits_that_are_there():
    _, _, targets, lengths, _ = batch()
    logits = torch.randn(B, T, U + 1, V, requires_grad=True)
    with HostWaits() as found:
        transducer_loss(logits, targets, lengths, lengths, 0).backward()
    assert found.count == 1


def test_what_is_counted():
    x, chosen = torch.arange(4.0), torch.tensor([True, False, True, False])
    with HostWaits() as found:
        x.sum().item(), bool(chosen.any()), chosen.nonzero(), x[chosen]
        x[chosen] = 0
        chosen.nonzero_static(size=2), x[torch.tensor([1])], x + 1
    assert found.count == 5

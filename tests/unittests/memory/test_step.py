"""Counting bytes."""

import pytest
import torch
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from sb_memeff.lobes.models.RevECAPA_TDNN import RevECAPA_TDNN
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.lobes.models.WeSpeakerResNet import ResNet
from sb_memeff.memory.step import training_step_memory
from sb_memeff.memory.tracker import (
    KINDS,
    POINTS,
    ModuleTracker,
    StorageTracker,
)
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from sb_memeff.optim import SGD8bit
from tests.unittests.allocator import allocator_peak, assert_near_allocator
from tests.unittests.one_analysis import one_analysis  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_analysis")


def test_views_and_in_place_results_count_once():
    with StorageTracker() as tracker:
        x = torch.zeros(100)
        y = x.view(10, 10)
        y.add_(1)
        assert tracker.alive == tracker.peak == 400
        del x
        assert tracker.alive == 400
        del y
    assert (tracker.alive, tracker.peak) == (0, 400)


def linear_step(batch=50, **options):
    """One layer of 1000 x 1000 without bias."""
    return training_step_memory(
        lambda: nn.Linear(1000, 1000, bias=False), (batch, 1000), **options
    )


def test_a_step_whose_peak_can_be_counted_by_hand():
    memory = linear_step()
    weight, activation = 4_000_000, 200_000
    assert memory.parameters == 1_000_000
    assert memory.parameter_bytes == weight
    # The input was there before; the output stays.
    assert memory.saved_bytes == activation
    # Weight and gradient; input, output and its gradient.
    assert memory.peak_bytes == 2 * weight + 3 * activation
    assert memory.activation_bytes == 3 * activation


def test_the_peak_is_split_by_what_it_is_for():
    memory = linear_step(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    )
    assert memory.by_kind == {
        "parameters": 4_000_000,
        "buffers": 0,
        "gradients": 4_000_000,
        "optimizer states": 4_000_000,
        "inputs": 200_000,
        "activations": 200_000,
        "recomputed": 0,
        "temporaries": 200_000,
    }
    assert tuple(memory.by_kind) == KINDS
    assert sum(memory.split.values()) == memory.peak_bytes
    assert memory.peak_phase == "backward"
    assert memory.allocator_bytes is None


def test_temporaries_of_building_do_not_count():
    """Training never holds it together with activations."""

    def build():
        # As some initialisations do.
        torch.zeros(100_000)
        return nn.Linear(10, 10, bias=False)

    memory = training_step_memory(build, (5, 10))
    # Weight and gradient; input, output and its gradient.
    assert memory.peak_bytes == 2 * 400 + 3 * 200
    assert memory.peak_phase == "backward"


class Widens(nn.Module):
    """Needs much for a moment, and backward none of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x):
        with torch.no_grad():
            mean = x.repeat(50, 1).mean(0)
        return self.weight * mean


def test_temporaries_of_forward_do_not_count_as_recomputed():
    memory = training_step_memory(Widens, (8, 1000))
    assert memory.peak_phase == "forward"
    kinds = memory.by_kind
    assert kinds["recomputed"] == 0
    assert kinds["temporaries"] == 50 * 8 * 4000
    # The mean, which waits for backward.
    assert kinds["activations"] == 4000


def test_the_peak_is_split_by_module():
    def build():
        net = nn.Sequential(
            nn.BatchNorm1d(100),
            nn.Sequential(nn.Linear(100, 1000, bias=False), nn.ReLU()),
            nn.Linear(1000, 10, bias=False),
        )
        net.register_parameter("own", nn.Parameter(torch.zeros(7)))
        return net

    memory = training_step_memory(build, (512, 100), torch.optim.Adam)
    assert sum(memory.by_module().values()) == memory.peak_bytes
    assert sum(memory.by_module(1).values()) == memory.peak_bytes
    names = {n for n, _ in build().named_modules()}
    assert set(memory.by_module()) <= names
    assert list(memory.by_module(1))[0] == "1"
    split = memory.split
    for name, size in (("1.0", 400_000), ("2", 40_000)):
        assert split[name, "parameters"] == size
        # Adam counts the steps, too.
        assert split[name, "optimizer states"] == 2 * size + 4
    assert split["2", "gradients"] == 40_000
    assert ("1.0", "gradients") not in split, "not yet"
    assert split["", "parameters"] == 28
    assert ("", "optimizer states") not in split, "nothing used it"
    assert split["0", "buffers"] == 808
    # ReLU kept its output and computes the gradient of its input, from that
    # which the last layer gave it.
    assert split["1.1", "activations"] == 512 * 1000 * 4
    assert memory.peak_module == "1.1"
    assert split["1.1", "temporaries"] == 512 * 1000 * 4
    assert split["2", "temporaries"] == 512 * 1000 * 4


def test_reversible_networks_recompute_and_vanilla_ones_store():
    def by_kind(network, name, **options):
        return training_step_memory(
            lambda: network.from_preset(name, base_channels=8, **options),
            (8, 100, 80),
        ).by_kind

    # Its peak is in the replay of a body.
    ours = by_kind(RevResNet, "RevNet34", downsampling="invertible")
    vanilla = by_kind(ResNet, "ResNet34")
    assert ours["recomputed"] > ours["activations"] > 0
    assert vanilla["recomputed"] == 0
    assert vanilla["activations"] > 10 * ours["activations"]


def test_8bit_states_are_counted_in_8_bits():
    def states(optimizer):
        memory = linear_step(
            5000, optimizer=lambda p: optimizer(p, lr=0.1, momentum=0.9)
        )
        return memory.by_kind["optimizer states"]

    assert states(torch.optim.SGD) == 4_000_000
    # A scale for every block of values.
    assert states(SGD8bit) == pytest.approx(1_000_000, rel=0.03)


def totals(timeline):
    """Bytes alive at all points of all phases."""
    return [
        sum(sizes)
        for kinds in timeline.values()
        for sizes in zip(*kinds.values(), strict=True)
    ]


def test_a_timeline_that_can_be_counted_by_hand():
    memory = linear_step(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    )
    weight, activation = 4_000_000, 200_000
    expected = {
        "forward": {"activations": [0, activation]},
        # The output's gradient comes, the weight's comes, the former goes;
        # then the output, which the loss would be.
        "backward": {
            "gradients": [0, 0, weight, weight, weight],
            "activations": [activation] * 4 + [0],
            "temporaries": [0, activation, activation, 0, 0],
        },
        # Works in place.
        "step": {"gradients": [weight]},
    }
    always = {
        "parameters": weight,
        "optimizer states": weight,
        "inputs": activation,
    }
    assert list(memory.timeline) == list(expected)
    for phase, some in expected.items():
        count = len(next(iter(some.values())))
        assert memory.timeline[phase] == {
            kind: some.get(kind, [always.get(kind, 0)] * count)
            for kind in KINDS
        }
    without = linear_step().timeline
    assert list(without) == ["forward", "backward"]
    assert not any(without["backward"]["optimizer states"])


def test_a_timeline_holds_what_was_alive_at_each_time():
    with StorageTracker() as tracker:
        seen = [tracker.alive]

        def note():
            assert len(seen) == tracker.clock
            seen.append(tracker.alive)

        kept, before = torch.zeros(10), torch.zeros(20)
        seen += [40, 120]
        del before
        note()
        start = tracker.clock
        across = torch.zeros(30)
        note()
        middle = tracker.clock
        short = torch.zeros(40)
        note()
        del short
        note()
        del kept
        note()
        end = tracker.clock
        late = torch.zeros(50)
        tracker.label("activations", [("", across)])
        del across, late
    found = {
        "forward": tracker.timeline(start, middle),
        "backward": tracker.timeline(middle, end),
    }
    assert seen[start:] == [40, 160, 320, 160, 120]
    assert totals(found) == seen[start : middle + 1] + seen[middle:]
    assert found["backward"]["activations"] == [120] * 4
    assert found["backward"]["temporaries"] == [40, 200, 40, 0]


class Ripples(nn.Module):
    """Many tensors that live for a moment, one of them large."""

    def forward(self, x):
        with torch.no_grad():
            for i in range(1000):
                y = x + 1
                if i == 701:
                    y.repeat(500)
        return x * 2


def test_a_thinned_timeline_keeps_the_peak():
    def build():
        return nn.Sequential(nn.Linear(100, 100, bias=False), Ripples())

    memory = training_step_memory(build, (100,))
    points = totals(memory.timeline)
    # More than 1000 births and as many deaths.
    assert len(memory.timeline["forward"]["inputs"]) == POINTS
    assert len(points) < 3 * POINTS < 500
    assert max(points) == memory.peak_bytes
    assert memory.peak_bytes > 40_000 + 500 * 400
    # Where it was, and for a moment alone.
    place = points.index(memory.peak_bytes)
    assert place == pytest.approx(0.7 * POINTS, abs=3)
    assert points.count(memory.peak_bytes) == 1


class Hungry(torch.optim.SGD):
    """Needs much for a moment in some of its steps."""

    def __init__(self, parameters, when):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.count, self.when = 0, when

    def step(self):
        """Counts."""
        super().step()
        self.count += 1
        if self.count in self.when:
            torch.zeros(10_000_000)


@pytest.mark.parametrize("when", [{1}, {2}, {1, 2}])
def test_the_timeline_is_of_the_step_with_the_peak(when):
    memory = linear_step(optimizer=lambda p: Hungry(p, when))
    assert memory.peak_phase == "step"
    assert memory.peak_bytes == 3 * 4_000_000 + 200_000 + 40_000_000
    assert max(totals(memory.timeline)) == memory.peak_bytes
    # In the first, forward had no states yet; of equals it is the last.
    states = memory.timeline["forward"]["optimizer states"]
    assert set(states) == {4_000_000 if 2 in when else 0}


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adam],
)
def test_the_second_step_is_taken_from_the_first(optimizer):
    def count(fake):
        return training_step_memory(
            lambda: nn.Sequential(
                nn.Linear(50, 70), nn.ReLU(), nn.Linear(70, 9)
            ),
            (400, 50),
            optimizer,
            fake=fake,
        )

    counted, run = count(True), count(False)
    assert counted.split == run.split
    assert counted.timeline == run.timeline
    assert counted.peak_phase == run.peak_phase == "backward"


class Keeps(nn.Linear):
    """Keeps its last output until the next one is there."""

    last = None

    def forward(self, x):
        y = super().forward(x)
        self.last = y.detach() * 2
        return y


class Remakes(nn.Linear):
    """Makes its buffer anew in the first step."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("masks", torch.zeros(1000))

    def forward(self, x):
        if self.masks.numel() == 1000:
            self.masks = torch.ones(50_000)
        return super().forward(x)


class Hoards(nn.Linear):
    """Keeps the outputs of all steps."""

    def forward(self, x):
        y = super().forward(x)
        self.kept = [*getattr(self, "kept", []), y.detach() * 2]
        return y


@pytest.mark.parametrize(
    ("network", "backwards"), [(Keeps, 1), (Remakes, 1), (Hoards, 2)]
)
def test_the_second_step_is_run_as_far_as_it_may_differ(network, backwards):
    passes = []

    def build():
        net = network(10, 100)
        net.weight.register_hook(lambda _: passes.append(1))
        return net

    def count(fake):
        return training_step_memory(
            build, (500, 10), lambda p: torch.optim.SGD(p, 0.1), fake=fake
        )

    counted = count(True)
    assert len(passes) == backwards
    run = count(False)
    assert counted.split == run.split
    assert counted.timeline == run.timeline
    if network is Remakes:
        assert counted.by_kind["buffers"] == 200_000


@pytest.mark.parametrize("network", [Keeps, nn.Linear])
def test_what_is_released_after_the_update_is_in_use_in_it(network):
    """As the outputs of a Brain's compute_forward."""

    def count(fake):
        held = []

        def step(net):
            held.append(net(torch.zeros(200, 10)))
            return held[0].sum()

        def optimizer(parameters):
            updater = torch.optim.Adam(parameters)
            updater.register_step_post_hook(lambda *_: held.clear())
            return updater

        return training_step_memory(
            lambda: network(10, 2000), step, optimizer, fake=fake
        )

    counted, run = count(True), count(False)
    assert counted.split == run.split
    for phase in ("forward", "backward", "step"):
        ours, theirs = ({phase: x.timeline[phase]} for x in (counted, run))
        assert max(totals(ours)) == max(totals(theirs))
    for x in counted, run:
        assert x.timeline["step"]["activations"][0] >= 200 * 2000 * 4


class Odd(torch.optim.SGD):
    """Replaces, keeps or drops tensors in its own way."""

    def __init__(self, parameters, way):
        super().__init__(parameters, lr=0.1)
        self.way = way
        for p in self.parameters:
            if way == "makes states in backward":
                p.register_post_accumulate_grad_hook(self.make_state)

    @property
    def parameters(self):
        return self.param_groups[0]["params"]

    def make_state(self, p):
        if not self.state[p]:
            self.state[p]["sum"] = torch.zeros_like(p)

    def step(self):
        for p in self.parameters:
            if self.way == "replaces parameters":
                p.data = p.data - 0.1 * p.grad
            elif self.way == "replaces gradients":
                p.grad = 0.5 * p.grad
            elif self.way == "keeps gradients as states":
                self.state[p]["last"] = p.grad
            elif self.way == "drops gradients":
                p.grad = None
        super().step()

    def zero_grad(self, set_to_none=True):
        super().zero_grad(self.way != "zeroes gradients in place")


@pytest.mark.parametrize(
    "way",
    [
        "replaces parameters",
        "replaces gradients",
        "keeps gradients as states",
        "drops gradients",
        "makes states in backward",
        "zeroes gradients in place",
    ],
)
def test_the_second_step_is_run_with_an_odd_optimizer(way):
    def count(fake):
        return training_step_memory(
            lambda: nn.Sequential(*(nn.Linear(50, 50) for _ in range(3))),
            (20, 50),
            lambda p: Odd(p, way),
            fake=fake,
        )

    counted, run = count(True), count(False)
    assert counted.split == run.split
    assert counted.timeline == run.timeline


@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_peak_is_split_and_drawn_whenever_outputs_are_released(when):
    def count(fake):
        held = []

        def step(net):
            y = net(torch.zeros(20, 10))
            held.extend([y, *(y.detach() * n for n in range(3))])
            return y.sum()

        def optimizer(parameters):
            updater = torch.optim.SGD(parameters, 0.1, weight_decay=0.1)
            add = getattr(updater, f"register_step_{when}_hook")
            add(lambda *_: held.clear())
            return updater

        return training_step_memory(
            lambda: nn.Linear(10, 2000), step, optimizer, fake=fake
        )

    counted, run = count(True), count(False)
    assert counted.split == run.split
    assert max(totals(counted.timeline)) == counted.peak_bytes


class Prepares(nn.Linear):
    """Its first forward needs much for a moment."""

    ready = False

    def forward(self, x):
        if not self.ready:
            self.ready, self.table = True, torch.zeros(10**6)[:100_000] + 1
        return super().forward(x)


def test_a_peak_of_the_first_forward_is_not_the_seconds():
    """Adam's states come later."""

    def count(fake):
        return training_step_memory(
            lambda: Prepares(1000, 200), (5, 1000), torch.optim.Adam, fake=fake
        )

    counted, run = count(True), count(False)
    assert counted.split == run.split
    assert counted.peak_bytes < 4 * 10**6 + 4 * 4 * 200_000
    assert counted.timeline == run.timeline


def transducer():
    """A joint loss on random encodings, the way a step would call it."""
    loss = TransducerJointLoss(
        Transducer_joint(),
        nn.Linear(32, 100),
        occupancy_floor=0,
        max_rows=2048,
    )
    loss.encoder = nn.Linear(32, 32)
    return loss


def transducer_step(loss):
    """The loss of 4 samples of 50 frames and 10 targets."""
    with torch.device(loss.classifier.weight.device):
        enc = loss.encoder(torch.rand(4, 50, 32))
        lens = torch.tensor([1.0, 0.5, 1.0, 0.9])
        targets = torch.ones(4, 10, dtype=torch.long)
        return loss(enc, torch.rand(4, 11, 32), targets, lens, torch.ones(4))


# Channels are those of real networks: to narrower ones oneDNN adds some.
NETWORKS = {
    "vanilla": (lambda: ResNet.from_preset("ResNet34"), (2, 50, 80)),
    "Type I": (lambda: RevResNet.from_preset("RevNet34"), (2, 50, 80)),
    "Type II": (
        lambda: RevResNet.from_preset("RevNet34", downsampling="invertible"),
        (2, 50, 80),
    ),
    "ECAPA": (
        lambda: RevECAPA_TDNN(80, channels=[64] * 4 + [192]),
        (4, 50, 80),
    ),
    "transducer": (transducer, transducer_step),
}


def train(build, step, optimizer):
    """As the analysis does: two steps."""
    net = build()
    x = None if callable(step) else torch.zeros(step)
    updater = optimizer(net.parameters())
    for _ in range(2):
        y = step(net) if callable(step) else net(x)
        y.backward(torch.ones_like(y))
        del y
        updater.step()
        updater.zero_grad()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_analysis_agrees_with_the_allocator(name):
    build, step = NETWORKS[name]
    torch.manual_seed(0)
    real = allocator_peak(lambda: train(build, step, torch.optim.Adam))
    found = training_step_memory(build, step, torch.optim.Adam)
    assert found.peak_bytes == pytest.approx(real, rel=0.02)
    assert max(totals(found.timeline)) == found.peak_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_the_analysis_agrees_with_the_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    build, step = NETWORKS[name]
    if not callable(step):
        step = (32, *step[1:])
    found = training_step_memory(build, step, torch.optim.Adam)
    real = training_step_memory(
        build, step, torch.optim.Adam, fake=False, device="cuda"
    )
    assert_near_allocator(found.peak_bytes, real.allocator_bytes)


def test_modules_are_followed_through_errors():
    net = nn.Sequential(nn.Linear(2, 2))
    with ModuleTracker() as modules:
        modules.name(net)
        with pytest.raises(RuntimeError):
            net(torch.rand(1, 3))
        assert modules.current() == ("", False)


def test_optimizer_states_are_counted():
    plain = linear_step().peak_bytes
    momentum = linear_step(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    ).peak_bytes
    adam = linear_step(optimizer=torch.optim.Adam).peak_bytes
    assert momentum - plain == pytest.approx(4e6, rel=0.06)
    assert adam - plain >= 8e6


def test_fake_and_real_tensors_agree():
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Flatten(),
            nn.Linear(8 * 16 * 16, 10),
        )

    fake = training_step_memory(build, (4, 3, 16, 16))
    real = training_step_memory(build, (4, 3, 16, 16), fake=False)
    assert fake.parameters == real.parameters
    assert fake.saved_bytes == pytest.approx(real.saved_bytes, rel=0.02)
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)


def test_autocast_changes_what_is_stored():
    def build():
        return nn.Sequential(*(nn.Conv1d(8, 8, 3) for _ in range(4)))

    full = training_step_memory(build, (4, 8, 1000))
    half = training_step_memory(build, (4, 8, 1000), autocast=torch.bfloat16)
    assert half.saved_bytes < full.saved_bytes

"""Launches, bytes and waits of a training step on a GPU, counted without one.

Fake tensors take the path of the kernels (``ops.dispatch.
fused_on_fake_tensors``). A kernel of ours counts once, with the tensors that it
reads and writes; an operation of torch counts as the kernels that it launches
on CUDA. What a GPU's caches save is not known here: bytes are an upper bound,
and serve to compare networks with one another.

    python benchmarks/gpu_cost.py

Authors
 * The sb_memeff authors 2026
"""

import argparse
import math
from collections import Counter

import torch
from resnets import networks
from result_file import write_results
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sb_memeff.memory.fake import fake_tensors
from sb_memeff.nnet.transducer_loss import joint_loss
from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss
from sb_memeff.ops.dispatch import fused_on_fake_tensors
from sb_memeff.ops.triton.launch import watch_launches
from sb_memeff.optim import AdamW8bit, SGD8bit

# Operations that launch nothing, views aside.
FREE = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "promote_types",
    "_unsafe_view",
    "_local_scalar_dense",
    "lift_fresh",
    "result_type",
    "set_",
}
# Tensors that a launch of torch's foreach takes, by the number of lists.
FOREACH = (110, 64, 48, 36, 30)
# Arguments of our kernels of which a launch touches no more than this one has:
# it gathers rows.
GATHERED = {
    **dict.fromkeys(("enc_ptr", "pred_ptr"), "joined_ptr"),
    **dict.fromkeys(("own_ptr", "other_ptr", "total_ptr"), "gradient_ptr"),
}


class Cost(TorchDispatchMode):
    """Counts kernels and the bytes that they move.

    Attributes
    ----------
    launches : Counter
        Name of the operation or kernel to launches.
    bytes : Counter
        The same, to bytes.
    flops : int
        Of products of matrices and convolutions.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.bytes = Counter(), Counter()
        self.flops = 0

    def __enter__(self):
        self._kernels = watch_launches(self._kernel)
        self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._kernels.__exit__(*error)

    @property
    def total(self):
        """Launches, bytes and FLOPs."""
        return self.launches.total(), self.bytes.total(), self.flops

    def _kernel(self, name, arguments):
        tensors = {
            key: x
            for key, x in arguments.items()
            if isinstance(x, torch.Tensor)
        }
        self.launches[name] += 1
        for key, x in tensors.items():
            limit = tensors.get(GATHERED.get(key), x)
            self.bytes[name] += min(_size(x), _size(limit))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in FREE or func.namespace != "aten":
            return result
        flops = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.flops += flops(*args, **kwargs, out_val=result)
        read = {id(x): x for x in _tensors((args, kwargs))}
        written = {id(x): x for x in _tensors(result)}
        in_place = [
            x
            for argument, value in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in _tensors(value)
        ]
        moved = sum(map(_size, read.values()))
        moved += sum(_size(x) for key, x in written.items() if key not in read)
        moved += sum(map(_size, in_place))
        launches = 1
        if name in ("copy_", "fill_", "zero_", "_foreach_copy_"):
            # Written, not read.
            moved -= sum(map(_size, _tensors(args[0])))
        elif name == "native_batch_norm":
            # Statistics, then normalisation.
            moved += _size(args[0])
        elif name == "native_batch_norm_backward":
            moved += _size(args[0]) + _size(args[1])
        elif name == "convolution_backward":
            gradient, x, weight = args[:3]
            for_x, for_weight = args[-1][:2]
            launches = int(for_x) + int(for_weight)
            moved = _size(gradient) * launches + _size(x) * for_weight
            moved += _size(weight) * for_x
            moved += sum(_size(y) for y in result if y is not None)
        elif name.startswith("_foreach"):
            lists = [x for x in (*args, result) if isinstance(x, list)]
            most = FOREACH[min(len(lists), len(FOREACH)) - 1]
            launches = math.ceil(len(lists[0]) / most)
        elif name in ("index", "index_select", "gather"):
            moved = 2 * sum(map(_size, written.values()))
        self.launches[name] += launches
        self.bytes[name] += moved
        return result


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _size(x):
    return x.numel() * x.element_size()


def network_step(build, dtype, shape):
    """Cost of forward and backward of a speaker network.

    Arguments
    ---------
    build : callable
        Returns the network.
    dtype : torch.dtype or None
        Of autocast; None is without.
    shape : tuple
        [batch, frames, bands].

    Returns
    -------
    Cost
        What was counted.
    """
    with fake_tensors(), fused_on_fake_tensors():
        net = build()
        features = torch.zeros(shape)
        with Cost() as cost:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                y = net(features)
            y.float().square().mean().backward()
    return cost


def speaker_networks(shape):
    """A row for each network and precision, beside the one that stores."""
    rows = []
    for depth in (34, 101, 293):
        for dtype in (None, torch.float16):
            stored = None
            for kind, build in networks(f"ResNet{depth}").items():
                cost = network_step(build, dtype, shape)
                launches, moved, _ = cost.total
                stored = stored or (launches, moved)
                rows.append(
                    {
                        "network": f"{depth} {kind}",
                        "precision": "fp32" if dtype is None else "fp16",
                        "launches": launches,
                        "gigabytes": round(moved / 1e9, 1),
                        "launches_ratio": round(launches / stored[0], 2),
                        "bytes_ratio": round(moved / stored[1], 2),
                        "largest": {
                            name: [cost.launches[name], round(size / 1e9, 1)]
                            for name, size in cost.bytes.most_common(12)
                        },
                    }
                )
                row = rows[-1]
                print(
                    f"{row['network']:<16}{row['precision']:<6}"
                    f"{launches:>7} launches ({row['launches_ratio']:.2f}x)"
                    f"{row['gigabytes']:>8.1f} GB ({row['bytes_ratio']:.2f}x)",
                    flush=True,
                )
    return rows


def joint_step(frames, targets, features, vocabulary):
    """Cost of the joint loss under bfloat16 of one sample."""
    from speechbrain.nnet.transducer.transducer_joint import Transducer_joint

    with fake_tensors(), fused_on_fake_tensors():
        loss = TransducerJointLoss(
            Transducer_joint(),
            nn.Linear(features, vocabulary),
            reduction="nll_sum",
            occupancy_floor=0.0,
        )
        options = {"dtype": torch.bfloat16, "requires_grad": True}
        enc = torch.zeros(1, frames, features, **options)
        pred = torch.zeros(1, targets + 1, features, **options)
        symbols = torch.ones(1, targets, dtype=torch.int64)
        ones = torch.ones(1)
        with Cost() as cost:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(enc, pred, symbols, ones, ones)
            value.backward()
    return cost.total


def joint(samples, frames, targets, features=640, vocabulary=1000):
    """Cost of the joint loss of a batch, all of whose cells paths visit.

    The analysis computes two tiles of a run whatever its size. Launches and
    bytes are linear in the number of tiles, so two sizes tell all.
    """
    cells = frames * (targets + 1)
    in_run = min(samples, max(1, joint_loss.GROUP_CELLS // cells))
    runs = math.ceil(samples / in_run)
    tile = joint_loss._rows_of_tile(torch.empty(0, device="meta"), vocabulary)
    one, two = (
        joint_step(n * tile // (targets + 1), targets, features, vocabulary)
        for n in (1, 2)
    )
    tiles = in_run * cells / tile
    launches, moved, flops = (
        runs * (a + (b - a) * (count - 1))
        for a, b, count in zip(one, two, (math.ceil(tiles), tiles, tiles))
    )
    row = {
        "shape": f"B {samples} T {frames} U {targets} H {features} V {vocabulary}",
        "launches": round(launches),
        "gigabytes": round(moved / 1e9, 1),
        "teraflops": round(flops / 1e12, 2),
        "runs": runs,
    }
    print(row, flush=True)
    return row


def optimizer_steps():
    """Launches of a step over RevNet293's parameters."""
    rows = []
    for cls, options in ((SGD8bit, {"momentum": 0.9}), (AdamW8bit, {})):
        with fake_tensors(), fused_on_fake_tensors():
            net = networks("ResNet293")["type_2"]()
            # As torch chooses on a GPU.
            optimizer = cls(
                net.parameters(),
                lr=0.1,
                weight_decay=1e-4,
                foreach=True,
                **options,
            )
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            # They make the states and the table.
            for _ in range(2):
                optimizer.step()
            with Cost() as cost:
                optimizer.step()
        rows.append(
            {
                "optimizer": cls.__name__,
                "launches": cost.launches.total(),
                "kernels": dict(cost.launches),
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=["joint", "optimizers", "networks"]
    )
    only = parser.parse_args().only
    results = {}
    if "joint" in only:
        results["joint"] = [joint(32, 250, 60), joint(1024, 1000, 200)]
    if "optimizers" in only:
        results["optimizers"] = optimizer_steps()
    if "networks" in only:
        results["networks"] = speaker_networks((64, 200, 80))
    if len(results) == 3:
        write_results(__file__, results)

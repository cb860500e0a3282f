"""All checks and measurements that need a GPU, one JSON line for each.

A run is limited to eight minutes (--minutes). Each part runs in its own process
with its own time limit, so a failure does not affect other parts. It runs from a
copy of the tree; make_bundle.sh packs the dependencies for a machine without a
network.

    python benchmarks/gpu.py [--small] [--only PART ...] [--minutes 8]

--small is a dry run on a CPU. Keep the lines as a result file:
``| tee benchmarks/results/gpu.jsonl``.

Authors
 * The sb_memeff authors 2026
"""

# ruff: noqa: B023, I001  (functions in loops are called at once)
import argparse
import cProfile
import contextlib
import copy
import gc
import json
import os
import pstats
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
SMALL = "--small" in sys.argv
# Parts that run in parallel, with their limits in seconds; then the timed parts,
# which run one by one.
TOGETHER = {
    "tests": 210,
    "recipes": 230,
    "exactness": 140,
    "limits": 100,
    "fp16": 60,
    "compiled": 150,
}
ALONE = {
    "machine": 30,
    "joint": 110,
    "optimizers": 40,
    "steps": 150,
    "ecapa": 40,
    "eleven_gb": 40,
}
DTYPES = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}


def say(**row):
    """Prints one line."""
    print(json.dumps(row), flush=True)


def check(name, function):
    """Prints the result of a function, or its error."""
    start = time.time()
    try:
        found = function()
        row = found if isinstance(found, dict) else {"found": found}
    except Exception as error:
        row = {
            "error": f"{type(error).__name__}: {str(error)[:400]}",
            "where": [
                line.strip()
                for line in traceback.format_exc().splitlines()[-6:-1]
            ],
        }
    say(check=name, s=round(time.time() - start, 1), **row)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def timed(step, rounds=3, warm=2):
    """Measures the median time of a step, the host's time, and peak memory.

    Arguments
    ---------
    step : callable
        The step to time.
    rounds : int
        Number of timed steps.
    warm : int
        Number of warm-up steps.

    Returns
    -------
    dict
        ms, host_ms (until the host has launched everything), peak_gb
        (max_memory_allocated).
    """
    for _ in range(warm):
        step()
    synchronize()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, launched = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        launched.append(time.perf_counter() - start)
        synchronize()
        times.append(time.perf_counter() - start)
    found = {
        "ms": round(1e3 * sorted(times)[rounds // 2], 2),
        "host_ms": round(1e3 * sorted(launched)[rounds // 2], 2),
    }
    if DEVICE == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return found


def waits(step):
    """Counts how often the host waits for the device in a step."""
    if DEVICE != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in seen)


def largest_kernels(step, rows=14):
    """Profiles the kernels of a step.

    Arguments
    ---------
    step : callable
        The step; called once as a warm-up.
    rows : int
        Number of kernels to list.

    Returns
    -------
    dict
        Launches and milliseconds of all kernels and of the longest ones, and
        the number of the host's waits.
    """
    step()
    synchronize()
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kind.CUDA if DEVICE == "cuda" else kind.CPU]
    ) as profile:
        step()
        synchronize()
    attribute = "self_device_time_total"
    events = [
        (getattr(e, attribute) / 1e3, e.count, e.key[:90])
        for e in profile.key_averages()
    ]
    events.sort(reverse=True)
    return {
        "waits": waits(step),
        "launches": sum(e[1] for e in events),
        "ms": round(sum(e[0] for e in events), 2),
        "kernels": [[round(ms, 3), n, name] for ms, n, name in events[:rows]],
    }


def host_time(step, rows=22):
    """Profiles the host's Python functions in a step.

    Arguments
    ---------
    step : callable
        The step; called twice as a warm-up.
    rows : int
        Number of functions to list.

    Returns
    -------
    dict
        Milliseconds of all functions, and [ms, calls, function] of the
        longest.
    """
    for _ in range(2):
        step()
    synchronize()
    profile = cProfile.Profile()
    # On a GPU backward runs in its own thread, which is not profiled.
    with torch.autograd.set_multithreading_enabled(False):
        profile.enable()
        step()
        synchronize()
        profile.disable()
    found = pstats.Stats(profile).stats
    largest = sorted(found.items(), key=lambda item: -item[1][2])[:rows]
    return {
        "ms": round(1e3 * sum(row[2] for row in found.values()), 1),
        "functions": [
            [
                round(1e3 * row[2], 2),
                row[1],
                f"{Path(where).name}:{line} {name}",
            ]
            for (where, line, name), row in largest
        ],
    }


def autocast(precision):
    """Returns the autocast context for fp32 (none), bf16 or fp16."""
    name = DTYPES[precision]
    if name is None:
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, getattr(torch, name))


# Parts


def machine():
    """Peak bandwidth and FLOPs of the card."""

    def found():
        n, k = (1 << 20, 256) if SMALL else (1 << 30, 8192)
        a = torch.empty(n, dtype=torch.uint8, device=DEVICE)
        b = torch.empty_like(a)
        row = dict(machine_and_versions())
        copied = timed(lambda: b.copy_(a), 10)["ms"]
        row["copy_gb_s"] = round(2 * n / 1e6 / copied, 1)
        for name in ("bfloat16", "float16", "float32"):
            x = torch.randn(k, k, device=DEVICE, dtype=getattr(torch, name))
            took = timed(lambda x=x: x @ x, 5)["ms"]
            row[f"tflops_{name}"] = round(2 * k**3 / 1e9 / took, 1)
        return row

    check("machine", found)


def pytest(*arguments, seconds):
    """Runs some tests; returns counts and failures."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    try:
        output = subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            capture_output=True,
            timeout=seconds,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "SB_MEMEFF_TEST_DEVICE": "cuda:0" if DEVICE == "cuda" else "",
            },
        ).stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    lines = output.decode(errors="replace").splitlines()
    errors = [x[:300] for x in lines if x.startswith("FAILED")]
    errors += [x[:300] for x in lines if x.startswith("E  ")][:60]
    return {
        "last": lines[-1:],
        "passed": sum(" PASSED " in x for x in lines),
        "failed": sum("] FAILED " in x or "] ERROR " in x for x in lines),
        "failures": errors,
    }


def tests():
    """Runs the tests marked gpu."""
    check(
        "kernels against float64",
        lambda: pytest(
            "-n",
            "4",
            "tests/unittests/ops",
            "tests/unittests/nnet/transducer_loss/test_sum_joint.py",
            "tests/unittests/nnet/test_norm_relu_conv.py",
            seconds=90,
        ),
    )
    marked = ["-n", "4", "-m", "gpu", "tests/unittests"]
    check("tests marked gpu", lambda: pytest(*marked, seconds=110))


def recipes():
    """Runs the recipes' tests on the GPU."""
    chosen = ["-k", "load"] if SMALL else []
    check(
        "recipes end to end",
        # Each file has one table of runs.
        lambda: pytest(
            *("-n", "2", "--dist", "loadscope"),
            *chosen,
            "tests/integration",
            seconds=220,
        ),
    )


def exactness():
    """Checks inversion and gradients in each precision and layout."""
    from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
    from sb_memeff.lobes.models.RevResNet import RevResNet
    from sb_memeff.nnet.replay import mismatch
    from sb_memeff.nnet.reversible import check_invertible

    def one(net, x, precision, benchmark, layout):
        torch.backends.cudnn.benchmark = benchmark
        tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        net = copy.deepcopy(net).to(memory_format=layout)
        with autocast("fp32" if tf32 else precision):
            report = check_invertible(net, x)
        mismatch.read_mismatches()
        return {
            "inversion": report.inversion_error,
            "gradient": report.gradient_error,
        }

    presets = {"RevNet34": RevResNet, "DFRevNet56": RevDFResNet}
    presets["RevNet101"] = RevResNet
    size = (2, 40) if SMALL else (16, 200)
    layouts = {
        "NCHW": torch.contiguous_format,
        "NHWC": torch.channels_last,
    }
    for name, kind in presets.items():
        width = {"base_channels": 8} if SMALL else {}
        net = kind.from_preset(name, downsampling="invertible", **width)
        net = net.to(DEVICE).train()
        x = torch.randn(*size, 80, device=DEVICE)
        for precision in ("fp32", "tf32", "bf16", "fp16"):
            for benchmark in (False, True):
                for layout, form in layouts.items():
                    check(
                        f"exact {name} {precision} {layout} "
                        f"cudnn.benchmark={benchmark}",
                        lambda: one(net, x, precision, benchmark, form),
                    )


def step_of(net, shape, precision="fp32", optimizer=None):
    """A training step of a network on random features."""
    x = torch.randn(*shape, device=DEVICE)
    optimizer = optimizer or torch.optim.SGD(
        net.parameters(), lr=1e-3, momentum=0.9
    )
    return training_step(net, x, optimizer, lambda: autocast(precision))


def limits():
    """Checks gradients near the memory limit, where cuDNN lacks workspace."""
    from sb_memeff.lobes.models.RevResNet import RevResNet

    if DEVICE != "cuda":
        return
    net = RevResNet.from_preset("RevNet101", downsampling="invertible")
    net = net.cuda().train()
    x = torch.randn(64, 200, 80, device=DEVICE)

    def gradients():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        twin = copy.deepcopy(net)
        twin(x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in twin.parameters()])

    free = gradients()
    peak = torch.cuda.max_memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    for share in (1.0, 0.97, 0.93, 0.9, 0.85, 0.8):
        torch.cuda.set_per_process_memory_fraction(share * peak / total)

        def one():
            found = gradients()
            return {
                "difference": ((found - free).norm() / free.norm()).item(),
                "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3),
            }

        check(f"RevNet101 within {share} of {peak / 1e9:.3f} GB", one)
    torch.cuda.set_per_process_memory_fraction(1.0)


def fp16():
    """Counts the steps that GradScaler takes with the joint loss."""
    from speechbrain.nnet.transducer.transducer_joint import Transducer_joint

    from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss

    def one(method, frames=250, symbols=50):
        torch.manual_seed(0)
        enc, classifier = torch.nn.Linear(64, 64), torch.nn.Linear(64, 100)
        enc, classifier = enc.to(DEVICE), classifier.to(DEVICE)
        loss = TransducerJointLoss(
            Transducer_joint(), classifier, method=method
        )
        optimizer = torch.optim.SGD(
            [*enc.parameters(), *classifier.parameters()], lr=1e-5
        )
        scaler = torch.amp.GradScaler(DEVICE)
        x = torch.randn(2, frames, 64, device=DEVICE)
        pred = torch.randn(2, symbols + 1, 64, device=DEVICE)
        targets = torch.randint(1, 100, (2, symbols), device=DEVICE)
        lens = torch.ones(2, device=DEVICE)
        taken = 0
        for _ in range(8 if SMALL else 40):
            with autocast("fp16"):
                e = enc(x)
                value = loss(e, pred.to(e.dtype), targets, lens, lens).mean()
            scaler.scale(value).backward()
            before = classifier.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            taken += not torch.equal(before, classifier.weight)
        return {"taken": taken, "scale": scaler.get_scale()}

    for method in ("tiled", "samplewise", "batched"):
        check(f"fp16 GradScaler {method}", lambda: one(method))


def compiled():
    """Compares gradients of compiled networks with eager ones.

    A compiled network sums in another order than an eager one. The vanilla
    network, and the distance of both from float64, show how much this matters.
    """
    from sb_memeff.nnet.replay import mismatch

    width = {"base_channels": 8} if SMALL else {}
    shape = (2, 40, 80) if SMALL else (16, 200, 80)
    x = torch.randn(*shape, device=DEVICE)

    def gradient(net, inputs, backend=None):
        run = torch.compile(net, backend=backend) if backend else net
        y = run(inputs)
        # Not the mean of squares, which batch norm makes constant.
        torch.manual_seed(0)
        (y * torch.randn(y.shape, device=DEVICE)).sum().backward()
        mismatch.read_mismatches()
        found = [p.grad for p in net.parameters() if p.grad is not None]
        return torch.cat([g.flatten().double() for g in found])

    def one(build, precision):
        net = build().to(DEVICE).train()
        exact = gradient(copy.deepcopy(net).double(), x.double())
        with autocast(precision):
            eager = gradient(copy.deepcopy(net), x)
            fused = gradient(copy.deepcopy(net), x, "inductor")

        def error(found, right):
            return ((found - right).norm() / right.norm()).item()

        return {
            "eager_against_float64": error(eager, exact),
            "inductor_against_float64": error(fused, exact),
            "inductor_against_eager": error(fused, eager),
        }

    built = networks("ResNet34", **width)
    # torch 2.12's inductor crashes on a CPU in the stored one.
    for kind in ("type_2",) if SMALL else ("type_2", "stored"):
        for precision in ("fp32", "bf16"):
            check(
                f"torch.compile ResNet34 {kind} {precision}, gradient",
                lambda: one(built[kind], precision),
            )


def joint():
    """Measures time and memory of the joint loss and its alternatives."""
    from speechbrain.nnet.loss.transducer_loss import (
        TransducerLoss as NumbaLoss,
    )
    from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
    from torchaudio_loss import TorchaudioJointLoss

    from sb_memeff.nnet.transducer_loss.joint_loss import TransducerJointLoss

    class SpeechBrainLoss(TorchaudioJointLoss):
        """SpeechBrain's kernels in numba."""

        def forward(self, enc, pred, targets, enc_lens, target_lens):
            """Computes the loss."""
            joined = self.joint(enc.unsqueeze(2), pred.unsqueeze(1))
            scores = self.classifier(joined).float().log_softmax(-1)
            frames = (enc_lens * enc.shape[1]).round().int()
            counts = (target_lens * targets.shape[1]).round().int()
            return NumbaLoss(blank=0, reduction="sum")(
                scores, targets.int(), frames, counts
            )

    def made(shape, dtype):
        batch, frames, symbols, hidden, vocabulary = shape
        torch.manual_seed(0)
        enc = torch.randn(batch, frames, hidden, device=DEVICE, dtype=dtype)
        pred = torch.randn(
            batch, symbols + 1, hidden, device=DEVICE, dtype=dtype
        )
        targets = torch.randint(1, vocabulary, (batch, symbols), device=DEVICE)
        lens = torch.ones(batch, device=DEVICE)
        classifier = torch.nn.Linear(hidden, vocabulary).to(DEVICE, dtype)
        return enc, pred, targets, lens, classifier

    def step_with(kind, inputs, **options):
        enc, pred, targets, lens, classifier = inputs
        loss = kind(
            Transducer_joint(), classifier, reduction="nll_sum", **options
        )

        def step():
            e, p = (x.detach().requires_grad_() for x in (enc, pred))
            loss(e, p, targets, lens, lens).backward()
            classifier.zero_grad()

        return step

    methods = {
        "torchaudio": (TorchaudioJointLoss, {}),
        "speechbrain": (SpeechBrainLoss, {}),
        "batched": (TransducerJointLoss, {"method": "batched"}),
        "samplewise": (TransducerJointLoss, {"method": "samplewise"}),
        "tiled": (TransducerJointLoss, {}),
        "tiled 2k": (TransducerJointLoss, {"max_rows": 2048}),
        "tiled 64k": (TransducerJointLoss, {"max_rows": 65536}),
    }
    bf16, fp32 = torch.bfloat16, torch.float32
    librispeech = (2, 20, 6, 16, 30) if SMALL else (32, 250, 60, 640, 1000)
    cases = [(librispeech, bf16, list(methods), 3)]
    cases.append((librispeech, fp32, list(methods), 3))
    if not SMALL:
        some = ["torchaudio", "batched", "tiled", "tiled 64k"]
        cases.append(((32, 400, 128, 640, 1024), bf16, some, 2))
        cases.append(((32, 400, 80, 640, 4096), bf16, some[2:], 1))
    torch.backends.cuda.matmul.allow_tf32 = True
    for shape, dtype, chosen, rounds in cases:
        name = "joint B{} T{} U{} H{} V{}".format(*shape) + f" {dtype}"
        cells = shape[0] * shape[1] * (shape[2] + 1)
        tflop = 8 * cells * shape[3] * shape[4] / 1e12
        say(check=f"{name} arithmetic", tflop=round(tflop, 3))
        for method in chosen:
            kind, options = methods[method]

            def one():
                inputs = made(shape, dtype)
                step = step_with(kind, inputs, **options)
                return timed(step, rounds, 1)

            check(f"{name} {method}", one)
    check(
        "kernels of joint tiled",
        lambda: largest_kernels(
            step_with(TransducerJointLoss, made(librispeech, bf16))
        ),
    )
    check(
        "host of joint tiled",
        lambda: host_time(
            step_with(TransducerJointLoss, made(librispeech, bf16))
        ),
    )
    if not SMALL:
        headline = (1024, 1000, 200, 640, 1024)
        check(
            "joint headline B1024 T1000 U200 H640 V1024 bf16 tiled",
            lambda: timed(
                step_with(TransducerJointLoss, made(headline, bf16)), 1, 0
            ),
        )


def steps():
    """Measures a training step of stored and reversible networks."""
    shape = (2, 40, 80) if SMALL else (64, 200, 80)
    width = {"base_channels": 8} if SMALL else {}
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    names = ["ResNet34", "ResNet101", "ResNet293", "DFResNet110"]
    for name in names[: 1 if SMALL else None]:
        for kind, build in networks(name, **width).items():
            built = build()
            precisions = (
                list(DTYPES) if name == "ResNet101" else ["fp32", "bf16"]
            )
            for precision in precisions:

                def one():
                    net = copy.deepcopy(built).to(DEVICE).train()
                    return timed(step_of(net, shape, precision))

                check(f"step {name} {kind} {precision}", one)
            if name == "ResNet101" and kind in ("stored", "type_2"):

                def nhwc():
                    net = copy.deepcopy(built).to(DEVICE).train()
                    net = net.to(memory_format=torch.channels_last)
                    return timed(step_of(net, shape, "bf16"))

                check(f"step {name} {kind} bf16 NHWC", nhwc)
    for kind in ("stored", "type_2"):
        build = networks(names[0 if SMALL else 1], **width)[kind]

        def kernels():
            net = build().to(DEVICE).train()
            return largest_kernels(step_of(net, shape, "bf16"), 20)

        check(f"kernels of {kind} bf16", kernels)

        def host():
            return host_time(step_of(build().to(DEVICE).train(), shape))

        check(f"host of {kind}", host)


def ecapa():
    """Measures a training step of ECAPA-TDNN."""
    from ecapa import NETWORKS, arguments_of

    shape = (2, 40, 80) if SMALL else (32, 300, 80)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    for kind, build in NETWORKS.items():
        for precision in ("fp32", "bf16"):

            def one():
                net = build(**arguments_of(64 if SMALL else 1024))
                return timed(step_of(net.to(DEVICE).train(), shape, precision))

            check(f"step ECAPA {kind} {precision}", one)
    for kind in ("checkpoint", "same_weights", "reversible"):

        def host():
            net = NETWORKS[kind](**arguments_of(64 if SMALL else 1024))
            return host_time(step_of(net.to(DEVICE).train(), shape))

        check(f"host of ECAPA {kind}", host)


def optimizers():
    """Measures time and state bytes of optimizers."""
    from sb_memeff import optim
    from sb_memeff.lobes.models.RevResNet import RevResNet

    fused = {"fused": True}
    kinds = {
        "torch SGD fused": (torch.optim.SGD, {"momentum": 0.9, **fused}),
        "SGD8bit": (optim.SGD8bit, {"momentum": 0.9}),
        "SGD8bit fused": (optim.SGD8bit, {"momentum": 0.9, **fused}),
        "torch AdamW fused": (torch.optim.AdamW, fused),
        "AdamW8bit": (optim.AdamW8bit, {}),
        "AdamW8bit fused": (optim.AdamW8bit, fused),
    }
    with contextlib.suppress(Exception):
        import bitsandbytes as bnb

        kinds["bitsandbytes SGD8bit"] = bnb.optim.SGD8bit, {"momentum": 0.9}
        kinds["bitsandbytes AdamW8bit"] = bnb.optim.AdamW8bit, {}
    name = "RevNet34" if SMALL else "RevNet293"
    for label, (kind, options) in kinds.items():

        def one():
            net = RevResNet.from_preset(name, downsampling="invertible")
            net = net.to(DEVICE)
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            optimizer = kind(net.parameters(), lr=1e-4, **options)
            found = timed(optimizer.step, 5)
            found["state_mb"] = round(optim.state_bytes(optimizer) / 1e6, 1)
            counted = largest_kernels(optimizer.step)
            found |= {name: counted[name] for name in ("launches", "waits")}
            return found

        check(f"optimizer {label}", one)


def eleven_gb():
    """Trains at 64 x 6 s in a process limited to 10.5 GB (a GPU of 11 GB)."""
    from sb_memeff import optim

    if DEVICE != "cuda":
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(10.5e9 / total)
    kinds = networks("ResNet293")
    for kind in ("type_2", "type_1", "checkpoint", "stored"):

        def one():
            net = kinds[kind]().to(DEVICE).train()
            optimizer = optim.SGD8bit(net.parameters(), lr=1e-3, momentum=0.9)
            return timed(step_of(net, (64, 600, 80), optimizer=optimizer), 2, 1)

        check(f"64 x 600 frames in 11 GB, ResNet293 {kind}", one)


# The parent process


def arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="+", default=[*TOGETHER, *ALONE])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--part")
    return parser.parse_args()


def start(part):
    """Starts a process that imports its modules and waits for its turn."""
    command = [sys.executable, __file__, "--part", part]
    return subprocess.Popen(
        [*command, *["--small"] * SMALL], stdin=subprocess.PIPE, text=True
    )


def finish(running, end):
    """Waits for parallel parts, each with its time limit."""
    begun = time.time()
    for part, process in running.items():
        limit = {**TOGETHER, **ALONE}[part] * (3 if SMALL else 1)
        left = min(begun + limit, end) - time.time()
        try:
            if process.wait(timeout=max(1, left)):
                say(part=part, error=f"exit status {process.returncode}")
        except subprocess.TimeoutExpired:
            process.kill()
            say(part=part, error=f"stopped after {time.time() - begun:.0f} s")


def main():
    """Runs the parts."""
    options = arguments()
    begun = time.time()
    end = begun + 60 * options.minutes
    processes = {part: start(part) for part in options.only}
    turns = [[part for part in TOGETHER if part in processes]]
    turns += [[part] for part in ALONE if part in processes]
    for turn in turns:
        for part in turn:
            processes[part].stdin.write("go\n")
            processes[part].stdin.flush()
        finish({part: processes[part] for part in turn}, end)
        say(done=turn, at=round(time.time() - begun, 1))


if __name__ == "__main__":
    if "--part" not in sys.argv:
        main()
        sys.exit()

import torch  # noqa: E402

from resnets import networks  # noqa: E402
from result_file import machine as machine_and_versions  # noqa: E402
from timing import synchronize, training_step  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if __name__ == "__main__":
    import sb_memeff.lobes.models.RevDFResNet  # noqa: F401
    import sb_memeff.nnet.transducer_loss.joint_loss  # noqa: F401

    sys.stdin.readline()
    globals()[arguments().part]()

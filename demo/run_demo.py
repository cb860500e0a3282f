"""The demo: a reversible network learns to tell speakers apart, on a CPU.

1. makes a small corpus of synthetic speakers (make_speakers.py),
2. measures the verification EER of the untrained RevNet34, trains it with the
   VoxCeleb recipe, and measures again on speakers it never heard,
3. compares memory and time of a training step with the vanilla ResNet34, and
   the bytes of 8-bit optimizer states with those of 32-bit ones,
4. says how to go on with data of your own.

    make demo        or        python demo/run_demo.py --epochs 8

Everything is narrow (a quarter of the published width) and short, so that it
takes minutes. The memory figures at full width do not depend on that.
"""

import argparse
import codecs
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from make_speakers import describe, make_speakers
from voices import CorpusError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "VoxCeleb" / "SpeakerRec"
TRAIN_YAML = "hparams/train_revnet.yaml"
VERIFY_YAML = "hparams/verification_revnet.yaml"

PRESET = "RevNet34"
BASE_CHANNELS = 8
FULL_CHANNELS = 32
N_MELS = 80
BATCH = 32
CROP_S = 2.0
# Frames of 10 ms.
DEMO_SHAPE = (BATCH, int(CROP_S * 100), N_MELS)
FULL_SHAPE = (64, 200, N_MELS)


class DemoError(Exception):
    """Says in one line which step failed."""


def heading(text):
    """Prints a heading.

    Arguments
    ---------
    text : str
        The heading.
    """
    print(f"\n== {text}", flush=True)


def is_progress(piece):
    """Whether a piece of output is a progress bar's.

    Arguments
    ---------
    piece : str
        Output between two line ends or carriage returns.

    Returns
    -------
    bool
        Whether it is.
    """
    return re.search(r"\d+%\|", piece) is not None


def is_news(piece):
    """Whether a line of a recipe's output is worth a line of the demo's.

    Arguments
    ---------
    piece : str
        Output between two line ends or carriage returns.

    Returns
    -------
    bool
        Whether it is: the lines with an epoch's statistics.
    """
    return re.search(r"epoch: *\d+.*loss", piece) is not None


def strip_colours(piece):
    """Takes the escape sequences out, so that a cut leaves none open.

    Arguments
    ---------
    piece : str
        Output of a program.

    Returns
    -------
    str
        The same without colours.
    """
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", piece)


def pieces_of(stream):
    """Cuts a byte stream at line ends and carriage returns, as it arrives.

    Arguments
    ---------
    stream : file
        Binary, unbuffered.

    Yields
    ------
    str
        The pieces, without their ends.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    while chunk := stream.read(4096):
        *whole, rest = re.split(r"[\r\n]+", rest + decoder.decode(chunk))
        yield from whole
    if rest:
        yield rest


def run_recipe(name, script, yaml, overrides, log):
    """Runs a script of the recipe: bars on the screen, everything in a log.

    Arguments
    ---------
    name : str
        What the step is called, should it fail.
    script : str
        The script.
    yaml : str
        Its hyperparameters.
    overrides : dict
        What differs from the yaml, and run options.
    log : Path
        File for the whole output.

    Raises
    ------
    DemoError
        If the script fails; its last lines are printed before.
    """
    command = [sys.executable, "-u", script, yaml]
    command += [f"--{key}={value}" for key, value in overrides.items()]
    show_bars = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1
    tail = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=RECIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        ) as process,
    ):
        print(" ".join(command), file=file)
        try:
            for piece in map(strip_colours, pieces_of(process.stdout)):
                if is_progress(piece):
                    if show_bars:
                        # Blanks wipe what a longer bar left behind.
                        line = piece.strip()[:width].ljust(width)
                        print(f"\r{line}", end="", flush=True)
                    continue
                print(piece, file=file, flush=True)
                tail = [*tail[-14:], piece]
                if is_news(piece):
                    start = "\r" if show_bars else ""
                    line = piece[piece.index("epoch") :].ljust(width)
                    print(f"{start}{line}".rstrip(" "), flush=True)
        except BaseException:
            process.terminate()
            raise
    if show_bars:
        print("\r" + " " * width + "\r", end="", flush=True)
    if process.returncode:
        print("\n".join(tail), file=sys.stderr)
        raise DemoError(f"{name} failed; all of its output is in {log}")


def network_overrides(corpus):
    """What training and verification have in common.

    Arguments
    ---------
    corpus : Path
        Folder of the corpus.

    Returns
    -------
    dict
        Overrides of the yaml, and run options.
    """
    return {
        "data_folder": corpus,
        "verification_file": corpus / "veri_test.txt",
        "num_workers": 0,
        "preset": PRESET,
        "base_channels": BASE_CHANNELS,
        "downsampling": "invertible",
        "device": "cpu",
    }


def train(corpus, output, epochs, speakers):
    """Trains with the recipe.

    Arguments
    ---------
    corpus : Path
        Folder of the corpus.
    output : Path
        Folder for checkpoints and logs.
    epochs : int
        Number of epochs.
    speakers : int
        Number of training speakers.
    """
    overrides = {
        **network_overrides(corpus),
        "output_folder": output,
        "batch_size": BATCH,
        "sentence_len": CROP_S,
        "number_of_epochs": epochs,
        "out_n_neurons": speakers,
    }
    run_recipe(
        "Training",
        "train_speaker_embeddings.py",
        TRAIN_YAML,
        overrides,
        output.parent / "train_output.txt",
    )


def verify(corpus, output, checkpoints):
    """Measures verification on the unseen speakers with the recipe.

    Arguments
    ---------
    corpus : Path
        Folder of the corpus.
    output : Path
        Folder for scores and the result.
    checkpoints : Path
        Where the trained network lies; None measures an untrained one.

    Returns
    -------
    dict
        The recipe's result; `eer` in per cent.
    """
    overrides = {
        **network_overrides(corpus),
        "output_folder": output,
        "pretrain_path": "null" if checkpoints is None else checkpoints,
    }
    shutil.rmtree(output, ignore_errors=True)
    run_recipe(
        "Verification",
        "speaker_verification_cosine.py",
        VERIFY_YAML,
        overrides,
        output.parent / f"{output.name}_output.txt",
    )
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def list_networks(depth, base_channels):
    """The networks that are compared.

    Arguments
    ---------
    depth : int
        Their depth, as in the names of the presets.
    base_channels : int
        Their width.

    Returns
    -------
    dict
        Name to a function that builds the network.
    """
    from sb_memeff.lobes.models.ResNet import ResNet
    from sb_memeff.lobes.models.RevResNet import RevResNet

    def reversible(downsampling):
        return lambda: RevResNet.from_preset(
            f"RevNet{depth}",
            base_channels=base_channels,
            downsampling=downsampling,
        )

    return {
        f"ResNet{depth}": lambda: ResNet.from_preset(
            f"ResNet{depth}", base_channels=base_channels
        ),
        f"RevNet{depth} Type I": reversible("strided"),
        f"RevNet{depth} Type II": reversible("invertible"),
    }


def time_steps(builders, shape, steps=5):
    """Times forward, backward and update.

    Arguments
    ---------
    builders : dict
        Name to a function that builds the network.
    shape : tuple
        Shape of the features, [batch, frames, bands].
    steps : int
        Timed steps of each network.

    Returns
    -------
    dict
        Name to the median in seconds.
    """
    import torch

    torch.manual_seed(0)
    features = torch.randn(shape)
    networks = {name: build() for name, build in builders.items()}
    optimizers = {
        name: torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        for name, network in networks.items()
    }
    seconds = {name: [] for name in networks}
    # In turn, so that whatever else the machine does hits all of them. The
    # first round warms up.
    for round_ in range(steps + 1):
        for name, network in networks.items():
            started = time.perf_counter()
            network(features).square().mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(s) for name, s in seconds.items()}


def compare():
    """Measures parameters, memory and time of the networks.

    Returns
    -------
    list
        One dict for each network and size, in the order of the table.
    """
    from sb_memeff.utils.memory import training_step_memory

    rows = []
    for depth, base_channels, shape, measure_time in (
        (34, BASE_CHANNELS, DEMO_SHAPE, True),
        (34, FULL_CHANNELS, FULL_SHAPE, False),
        (293, FULL_CHANNELS, FULL_SHAPE, False),
    ):
        builders = list_networks(depth, base_channels)
        seconds = time_steps(builders, shape) if measure_time else {}
        for name, build in builders.items():
            memory = training_step_memory(build, shape)
            rows.append(
                {
                    "network": name,
                    "depth": depth,
                    "base_channels": base_channels,
                    "shape": list(shape),
                    "parameters": memory.parameters,
                    "saved_bytes": memory.saved_bytes,
                    "peak_bytes": memory.peak_bytes,
                    "step_s": seconds.get(name),
                }
            )
    return rows


def print_table(rows):
    """Prints the comparison, each network against the first of its size.

    Arguments
    ---------
    rows : list
        As compare returns them.
    """
    title = None
    for row in rows:
        batch, frames, bands = row["shape"]
        size = (
            f"depth {row['depth']}, width {row['base_channels']}, "
            f"batch {batch} x {frames} frames x {bands} bands"
        )
        if size != title:
            title, first = size, row
            print(
                f"\n{size}\n{'network':<18}{'parameters':>12}"
                f"{'kept for backward':>19}{'peak memory':>20}"
                f"{'s/step':>8}"
            )
        fewer = first["peak_bytes"] / row["peak_bytes"]
        seconds = "" if row["step_s"] is None else f"{row['step_s']:.2f}"
        print(
            f"{row['network']:<18}{row['parameters'] / 1e6:>10.2f} M"
            f"{row['saved_bytes'] / 2**20:>15.1f} MiB"
            f"{row['peak_bytes'] / 2**20:>9.0f} MiB {f'1/{fewer:.1f}':>6}"
            f"{seconds:>8}"
        )
    print(
        "\nPeak: parameters, gradients, activations and temporaries of one "
        "step\nwithout optimizer states, counted on fake tensors. Seconds: "
        "this machine."
    )


def compare_states():
    """Measures the states of the optimizers, 32-bit and 8-bit.

    Returns
    -------
    list
        One dict for each optimizer.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sb_memeff import optim
    from sb_memeff.lobes.models.RevResNet import RevResNet

    rows = []
    for name in ("SGD", "Adam"):
        options = {"momentum": 0.9} if name == "SGD" else {}
        for kind in (
            getattr(torch.optim, name),
            getattr(optim, f"{name}8bit"),
        ):
            with FakeTensorMode():
                network = RevResNet.from_preset("RevNet101")
                optimizer = kind(network.parameters(), lr=0.1, **options)
                for parameter in network.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                states = optim.state_bytes(optimizer)
            rows.append({"optimizer": kind.__name__, "state_bytes": states})
    return rows


def print_states(rows):
    """Prints the bytes of the states.

    Arguments
    ---------
    rows : list
        As compare_states returns them.
    """
    print("\nOptimizer states of RevNet101, full width")
    for full, packed in zip(rows[::2], rows[1::2]):
        bytes_ = [row["state_bytes"] for row in (full, packed)]
        print(
            f"{full['optimizer']:<6}{bytes_[0] / 2**20:>8.1f} MiB    "
            f"{packed['optimizer']:<10}{bytes_[1] / 2**20:>6.1f} MiB"
            f"    1/{bytes_[0] / bytes_[1]:.1f}"
        )


def print_next_steps(results):
    """Tells how to go on.

    Arguments
    ---------
    results : Path
        Where the demo's results lie.
    """
    if ROOT in results.parents:
        results = results.relative_to(ROOT)
    print(f"""
Results: {results}/ (summary.json, train/train_log.txt, *_output.txt)

With your own VoxCeleb (16 kHz wav, full width, a GPU):

  source .venv/bin/activate
  cd recipes/VoxCeleb/SpeakerRec
  python train_speaker_embeddings.py {TRAIN_YAML} \\
      --data_folder=/path/to/VoxCeleb --out_n_neurons=NUMBER_OF_SPEAKERS
  python speaker_verification_cosine.py {VERIFY_YAML} \\
      --data_folder=/path/to/VoxCeleb

Both take the trials from /path/to/VoxCeleb/veri_test2.txt unless
--verification_file names another list.""")


def run(arguments):
    """Runs all steps.

    Arguments
    ---------
    arguments : argparse.Namespace
        Arguments of the command line.

    Raises
    ------
    CorpusError
        If the corpus cannot be made.
    DemoError
        If a later step fails.
    """
    results, corpus = arguments.results.resolve(), arguments.data.resolve()
    results.mkdir(parents=True, exist_ok=True)

    heading("1/3 A corpus of synthetic speakers")
    manifest = make_speakers(corpus, progress=sys.stderr.isatty())
    print(describe(manifest))

    heading(
        f"2/3 {PRESET} (fully reversible), 8-bit SGD, {arguments.epochs} epochs"
    )
    # A leftover checkpoint would be resumed, and nothing trained.
    shutil.rmtree(results / "train", ignore_errors=True)
    before = verify(corpus, results / "verify_untrained", None)
    print(f"EER untrained: {before['eer']:.1f} %", flush=True)
    started = time.perf_counter()
    speakers = manifest["options"]["train_speakers"]
    train(corpus, results / "train", arguments.epochs, speakers)
    train_s = time.perf_counter() - started
    after = verify(
        corpus, results / "verify_trained", results / "train" / "save"
    )
    print(
        f"EER on unseen speakers: {before['eer']:.1f} % untrained, "
        f"{after['eer']:.1f} % after {train_s:.0f} s of training"
    )

    heading("3/3 A training step, vanilla and reversible")
    rows = compare()
    print_table(rows)
    states = compare_states()
    print_states(states)
    summary = {
        "corpus": {k: v for k, v in manifest.items() if k != "voices"},
        "epochs": arguments.epochs,
        "train_s": round(train_s, 1),
        "untrained": before,
        "trained": after,
        "steps": rows,
        "optimizer_states": states,
    }
    (results / "summary.json").write_text(
        json.dumps(summary, indent=1) + "\n", encoding="utf-8"
    )
    print_next_steps(results)
    if after["eer"] >= before["eer"]:
        raise DemoError("Training did not improve the EER")


def main(argv=None):
    """Runs the command line.

    Arguments
    ---------
    argv : list
        Arguments; None for those of the process.

    Returns
    -------
    int
        Exit status.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--epochs", type=int, default=8, help="default: %(default)s"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "data" / "demo" / "voices",
        help="folder of the corpus; default: data/demo/voices",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results" / "demo",
        help="default: results/demo",
    )
    arguments = parser.parse_args(argv)
    # As an exception it ends the recipe's process as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.perf_counter()
    try:
        run(arguments)
    except (CorpusError, DemoError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        return 130
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    print(f"\nTotal: {minutes} min {seconds} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

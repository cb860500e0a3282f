"""The command ``sb-memeff`` (also ``python -m sb_memeff.cli``).

Authors
 * The sb_memeff authors 2026
"""

import argparse
import sys

import torch

from sb_memeff.analysis.check import check_recipe
from sb_memeff.analysis.recipe import read_recipe
from sb_memeff.lobes.models.DFResNet import DFResNet
from sb_memeff.lobes.models.ResNet import ResNet
from sb_memeff.lobes.models.RevDFResNet import RevDFResNet
from sb_memeff.lobes.models.RevResNet import RevResNet
from sb_memeff.utils.export import export_speaker_model, export_speaker_onnx

__all__ = ["main"]


def preset_rows():
    """Name, variant and number of parameters of every preset.

    Returns
    -------
    list of tuple
        (name, variant, parameters).
    """
    variants = []
    for vanilla, reversible in ((ResNet, RevResNet), (DFResNet, RevDFResNet)):
        variants += [(name, "", vanilla, {}) for name in vanilla.PRESETS]
        for name in reversible.PRESETS:
            for kind in ("strided", "invertible"):
                options = {"downsampling": kind}
                variants.append((name, kind, reversible, options))
    rows = []
    with torch.device("meta"):
        for name, variant, cls, options in variants:
            net = cls.from_preset(name, **options)
            count = sum(p.numel() for p in net.parameters())
            rows.append((name, variant, count))
    return rows


def presets(arguments):
    """Lists the networks that ``from_preset`` knows."""
    for name, variant, count in preset_rows():
        print(f"{name:17s} {variant:12s} {count / 1e6:7.2f} M parameters")


def export(arguments):
    """Makes a folder that SpeechBrain's SpeakerRecognition loads."""
    export_speaker_model(arguments.output_folder, arguments.destination)
    print(
        f"Written to {arguments.destination}. Use it with\n"
        f"    from speechbrain.inference.speaker import SpeakerRecognition\n"
        f"    model = SpeakerRecognition.from_hparams("
        f"source={arguments.destination!r})\n"
        f'    score, same = model.verify_files("a.wav", "b.wav")'
    )
    if arguments.onnx:
        path = export_speaker_onnx(arguments.destination)
        print(f"And {path}, from normalised features to embeddings.")


def check(arguments):
    """Compares a training step with one that saves no memory."""
    recipe = read_recipe(arguments.hparams, arguments.overrides)
    report = check_recipe(
        recipe,
        arguments.batch,
        arguments.seconds,
        arguments.precision,
        arguments.device,
    )
    print(report)
    return 0 if report.passed else 1


def parse_overrides(unknown):
    """Reads what the parser does not know as overrides of a yaml file.

    Arguments
    ---------
    unknown : list of str
        Arguments of the form --key=value.

    Returns
    -------
    dict
        Key to value, as text.

    Raises
    ------
    ValueError
        For anything else.

    Example
    -------
    >>> parse_overrides(["--preset=RevNet101", "--lr=0.1"])
    {'preset': 'RevNet101', 'lr': '0.1'}
    """
    overrides = {}
    for argument in unknown:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not (argument.startswith("--") and key and equals):
            raise ValueError(
                f"{argument!r} is neither an option nor an override of the "
                f"yaml file: write --key=value."
            )
        overrides[key] = value
    return overrides


def build_parser():
    """The command line.

    Returns
    -------
    argparse.ArgumentParser
        Parser with one subcommand for each task.
    """
    parser = argparse.ArgumentParser(
        prog="sb-memeff",
        description="Memory-efficient training with SpeechBrain.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("presets", help=presets.__doc__)
    command.set_defaults(run=presets)
    command = commands.add_parser("export", help=export.__doc__)
    command.add_argument("output_folder", help="of a training run")
    command.add_argument("destination", help="folder to write")
    command.add_argument(
        "--onnx",
        action="store_true",
        help="write the embedding network as ONNX too",
    )
    command.set_defaults(run=export)
    command = commands.add_parser(
        "check", help=check.__doc__, allow_abbrev=False
    )
    command.add_argument("hparams", help="yaml file; --key=value overrides")
    command.add_argument("--batch", type=int, default=2, help="utterances")
    command.add_argument("--seconds", type=float, default=1.0)
    command.add_argument("--precision", help="fp32, bf16 or fp16")
    command.add_argument("--device", default="cpu")
    command.set_defaults(run=check, overrides={})
    return parser


def main(argv=None):
    """Runs the command.

    Arguments
    ---------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        0, or 1 if what was checked has failed, or 2 if the input was bad (one
        line on stderr says how).
    """
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and "overrides" not in arguments:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        arguments.overrides = parse_overrides(unknown)
        return arguments.run(arguments) or 0
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"sb-memeff: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

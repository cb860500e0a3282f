"""The command ``sb-memeff`` (also ``python -m sb_memeff.cli``).

Authors
 * The sb_memeff authors 2026
"""

import argparse
import sys

import torch

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
        0, or 2 if the input was bad (one line on stderr says how).
    """
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"sb-memeff: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

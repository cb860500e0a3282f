"""The command ``sb-memeff`` (also ``python -m sb_memeff.cli``).

Authors
 * The sb_memeff authors 2026
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from sb_memeff.analysis import plot
from sb_memeff.analysis.check import check_recipe
from sb_memeff.analysis.durations import loader_batches, read_durations
from sb_memeff.analysis.families.speaker import RESNETS, TYPES
from sb_memeff.analysis.fit import (
    fit as find_fit,
    usable,
)
from sb_memeff.analysis.oversized import find_oversized
from sb_memeff.analysis.profile import (
    Profile,
    comparison,
    profile as analyse,
    report,
)
from sb_memeff.analysis.recipe import read_recipe
from sb_memeff.export.speaker_folder import (
    export_speaker_model,
    export_speaker_onnx,
)
from sb_memeff.memory.leftovers import no_leftovers
from sb_memeff.memory.units import format_bytes

__all__ = ["main"]


def preset_rows() -> list[tuple[str, str, int]]:
    """Name, variant and number of parameters of every preset.

    Returns
    -------
    list of tuple
        (name, variant, parameters).
    """
    networks = []
    for vanilla, reversible in RESNETS:
        networks += [(name, "", vanilla, {}) for name in vanilla.PRESETS]
        for name in reversible.PRESETS:
            for kind in TYPES:
                options = {"downsampling": kind}
                networks.append((name, kind, reversible, options))
    rows = []
    with torch.device("meta"):
        for name, variant, cls, options in networks:
            net = cls.from_preset(name, **options)
            count = sum(p.numel() for p in net.parameters())
            rows.append((name, variant, count))
    return rows


def presets(arguments: argparse.Namespace) -> None:
    """Lists the presets of all networks."""
    for name, variant, count in preset_rows():
        print(f"{name:17s} {variant:12s} {count / 1e6:7.2f} M parameters")


def export(arguments: argparse.Namespace) -> None:
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
        print(f"{path} maps normalised features to embeddings.")


def profile(arguments: argparse.Namespace) -> None:
    """Analyses the memory of a recipe's training step; no GPU needed."""
    for path in (arguments.json, arguments.plot, arguments.timeline):
        if path is not None:
            _check_writable(path)
    for path in (arguments.plot, arguments.timeline):
        if path is not None:
            plot.check_picture(path)
    recipe = read_recipe(arguments.hparams, arguments.overrides)
    rows = recipe.variants() if arguments.compare else [recipe.own_variant()]
    profiles = []
    # Entered once for all rows.
    with no_leftovers() if rows[1:] else contextlib.nullcontext():
        for variant in rows:
            if arguments.compare:
                print(f"{variant.label} ...", file=sys.stderr)
            profiles.append(
                analyse(
                    recipe,
                    arguments.batch,
                    arguments.seconds,
                    arguments.tokens,
                    arguments.precision,
                    variant,
                    arguments.device,
                )
            )
    if arguments.compare and not rows[1:]:
        print(
            f"{recipe.path}: there is no alternative to {rows[0].label}.",
            file=sys.stderr,
        )
    print(comparison(profiles) if arguments.compare else report(profiles[0]))
    if arguments.json is not None:
        with open(arguments.json, "w", encoding="utf-8") as f:
            json.dump([_plain(one) for one in profiles], f, indent=2)
            f.write("\n")
    if arguments.plot is not None:
        plot.plot_kinds(profiles, arguments.plot)
    if arguments.timeline is not None:
        plot.plot_timelines(profiles, arguments.timeline)


def _check_writable(file: str) -> None:
    """Checks that a file can be written, before minutes of work."""
    path = Path(file).absolute()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder for {path}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"No permission to write {path}.")


def _plain(result: Profile) -> dict[str, Any]:
    """Converts a profile for JSON."""
    row = asdict(result)
    # Thousands of numbers, only of use in a picture.
    del row["memory"]["timeline"]
    del row["memory"]["split"]
    row["memory"]["by_kind"] = result.memory.by_kind
    row["memory"]["by_module"] = result.memory.by_module()
    return row


def fit(arguments: argparse.Namespace) -> None:
    """Finds the largest batch that fits on a GPU.

    With dynamic batching it finds the largest length of a batch, with --batch
    the longest utterances. With --batch and --seconds it finds the deepest
    preset or, for a transducer or transformer, the recomputation that takes the
    least time. With --durations it names the batches of a data set that do not
    fit.
    """
    limit = usable(arguments.budget, arguments.margin)
    if arguments.durations is not None:
        _fit_durations(arguments, limit)
        return
    result = find_fit(
        arguments.hparams,
        arguments.overrides,
        limit,
        arguments.batch,
        arguments.seconds,
        arguments.tokens,
        arguments.precision,
        progress=_print_progress,
    )
    print(
        f"{arguments.budget} less the margin: {format_bytes(result.limit)}\n"
        f"{result.profile.label}, {result.profile.batch_text}: "
        f"{format_bytes(result.profile.memory.peak_bytes)}\n"
        + " ".join(f"--{k}={v}" for k, v in result.overrides.items())
    )
    if result.yaml is not None:
        print(
            f"and in the yaml file, after modules and in place of any other "
            f"__recompute,\n{result.yaml}"
        )


def _fit_durations(arguments: argparse.Namespace, limit: int) -> None:
    for option in ("batch", "seconds"):
        if getattr(arguments, option) is not None:
            raise ValueError(
                f"--durations takes the batches from the yaml file: override "
                f"its keys instead of giving --{option}."
            )
    recipe = read_recipe(arguments.hparams, arguments.overrides)
    batches = loader_batches(recipe, read_durations(arguments.durations))

    def measure(utterances: int, seconds: float) -> int:
        result = analyse(
            recipe, utterances, seconds, arguments.tokens, arguments.precision
        )
        _print_progress(result)
        return result.memory.peak_bytes

    # Entered once for all analyses.
    with no_leftovers():
        print(find_oversized(batches, measure, limit))


def _print_progress(result: Profile) -> None:
    print(
        f"{result.label}, {result.batch_text}: "
        f"{format_bytes(result.memory.peak_bytes)}",
        file=sys.stderr,
    )


def check(arguments: argparse.Namespace) -> int:
    """Compares a training step with one that stores all activations."""
    result = check_recipe(
        read_recipe(arguments.hparams, arguments.overrides),
        arguments.batch,
        arguments.seconds,
        arguments.precision,
        arguments.device,
    )
    print(result)
    return 0 if result.passed else 1


def parse_overrides(unknown: Sequence[str]) -> dict[str, str]:
    """Parses the rest of the command line as keys of the yaml file.

    Arguments
    ---------
    unknown : list of str
        Each ``--key=value``, as in SpeechBrain's recipes, or a key followed
        by its value.

    Returns
    -------
    dict
        Key to value.

    Raises
    ------
    ValueError
        If an argument has another form.

    Example
    -------
    >>> parse_overrides(["--preset=RevNet101", "--n_mels", "40"])
    {'preset': 'RevNet101', 'n_mels': '40'}
    """
    overrides, rest = {}, list(unknown)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        if not (key.startswith("--") and key[2:] and equals):
            raise ValueError(
                f"{key!r} is neither an option nor an override of the yaml "
                f"file: write --key=value."
            )
        overrides[key.removeprefix("--")] = value
    return overrides


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line.

    Returns
    -------
    argparse.ArgumentParser
        Parser with a subcommand for each task.
    """
    parser = argparse.ArgumentParser(
        prog="sb-memeff",
        description="Memory-efficient training with SpeechBrain.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("presets", help=presets.__doc__)
    command.set_defaults(run=presets)
    command = commands.add_parser("export", help=export.__doc__)
    command.add_argument("output_folder", help="of a training")
    command.add_argument("destination", help="folder to write")
    command.add_argument(
        "--onnx",
        action="store_true",
        help="write the embedding network as ONNX too",
    )
    command.set_defaults(run=export)
    command = _add_recipe(commands, "profile", profile)
    _add_lengths(command)
    command.add_argument(
        "--compare",
        action="store_true",
        help="compare with the alternatives: vanilla, recomputed and "
        "reversible networks, or the methods of the transducer loss and "
        "recomputed encoders",
    )
    command.add_argument("--json", metavar="FILE", help="write the figures")
    command.add_argument(
        "--device", help="also run the step there, such as cuda, and compare"
    )
    command.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the peaks, split by kind (needs matplotlib)",
    )
    command.add_argument(
        "--timeline",
        metavar="FILE",
        help="draw the memory in use from forward to the optimizer's step "
        "(needs matplotlib)",
    )
    command = _add_recipe(commands, "fit", fit)
    _add_lengths(command)
    command.add_argument(
        "--budget", required=True, help="memory of the GPU, such as 11GB"
    )
    command.add_argument(
        "--margin",
        help="memory to leave free; by default 500 MB for CUDA's context and "
        "5 %% of the rest for fragmentation and workspaces",
    )
    command.add_argument(
        "--durations",
        metavar="FILE",
        help="csv (SpeechBrain's) or jsonl (lhotse's cuts) with the durations of "
        "a data set's utterances: name the batches that exceed the budget",
    )
    command = _add_recipe(commands, "check", check)
    command.add_argument("--batch", type=int, default=2, help="utterances")
    command.add_argument("--seconds", type=float, default=1.0, help="of each")
    command.add_argument("--device", default="cpu", help="such as cuda")
    return parser


def _add_recipe(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    """Adds a subcommand with a recipe's yaml file and overrides."""
    text = cast(str, run.__doc__)
    command = commands.add_parser(
        name,
        help=text.splitlines()[0],
        description=text,
        epilog="Any other --key=value overrides a key of the yaml file.",
        # Overrides must not be read as abbreviations of options.
        allow_abbrev=False,
    )
    command.add_argument("hparams", help="yaml file of a recipe")
    command.add_argument("--precision", help="fp32, bf16 or fp16")
    command.set_defaults(run=run, overrides={})
    return command


def _add_lengths(command: argparse.ArgumentParser) -> None:
    """Adds the options of the batch, by default the recipe's."""
    command.add_argument(
        "--batch", type=int, help="utterances in a batch of the data loader"
    )
    command.add_argument("--seconds", type=float, help="length of an utterance")
    command.add_argument("--tokens", type=int, help="length of a transcript")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Arguments
    ---------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        0; 1 if a check failed; 2 if the input was invalid (one line on stderr
        says why).
    """
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and "overrides" not in arguments:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        arguments.overrides = parse_overrides(unknown)
        return arguments.run(arguments) or 0
    except (ImportError, OSError, ValueError) as error:
        print(f"sb-memeff: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

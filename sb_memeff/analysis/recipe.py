"""From a yaml file of a known recipe to its training step.

Of the file, only what the step needs is made: no folder, no checkpointer, no
augmentation, no data, nothing downloaded, and no data set is needed.

Authors
 * The sb_memeff authors 2026
"""

import difflib
import io
import pydoc
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import ruamel.yaml
import ruamel.yaml.error
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.utils.logger import get_logger
from torch.nn import Module

from sb_memeff.analysis.augmentation import largest_copies
from sb_memeff.analysis.families import FAMILIES
from sb_memeff.analysis.families.step import TrainingStep, Variant

__all__ = ["Recipe", "read_recipe"]

logger = get_logger(__name__)

# Stands for a !PLACEHOLDER without an override.
UNKNOWN = "/PLACEHOLDER/{}/"
# They make folders and download: functions that take them are not called.
NEVER = ("checkpointer", "pretrainer", "train_logger")


def read_recipe(
    path: str | Path, overrides: dict[str, Any] | None = None
) -> "Recipe":
    """Reads a yaml file of a speaker or transducer recipe.

    Files are read, the objects in them are not made: see ``Recipe.build``.

    Arguments
    ---------
    path : str or Path
        SpeechBrain's or our VoxCeleb/SpeakerRec/hparams/train_*.yaml or
        LibriSpeech/ASR/transducer/hparams/*.yaml, or one like them.
    overrides : dict, optional
        Top-level keys to other plain values; text is read as yaml, as a
        recipe reads its command line. Placeholders that the step does not
        need (folders) may stay.

    Returns
    -------
    Recipe
        What the file says.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no such yaml file, an override changes nothing or an object,
        or a key that the step needs is missing. The message says which.

    Example
    -------
    >>> path = "recipes/VoxCeleb/SpeakerRec/hparams/train_revnet.yaml"
    >>> recipe = read_recipe(path, {"preset": "RevNet101"})
    >>> recipe.family, recipe.settings["preset"], recipe.default_batch()
    ('speaker', 'RevNet101', (128, 3.0))
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no yaml file {path}.")
    try:
        return Recipe(path, *_resolve(path, overrides or {}))
    except (ruamel.yaml.error.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not readable yaml: {_one_line(error)}."
        ) from error


class Recipe:
    """A training recipe, read and not yet made; see ``read_recipe``.

    Arguments
    ---------
    path : Path
        The yaml file, for messages.
    tree : dict
        Its content, references resolved.
    placeholders : collection of str
        Top-level placeholders that nobody has filled.

    Raises
    ------
    ValueError
        If it belongs to no known family, or a key that the step needs is
        missing.

    Attributes
    ----------
    family : str
        "speaker" or "transducer".
    settings : dict
        The plain values of the file: numbers, strings, lists, ...
    """

    def __init__(
        self, path: Path, tree: dict[str, Any], placeholders: Collection[str]
    ):
        self.path = path
        self._placeholders = placeholders
        modules = tree.get("modules")
        if not isinstance(modules, dict) or not modules:
            raise ValueError(
                f"{path} has no modules: it is no yaml file for training with "
                f"SpeechBrain's Brain."
            )
        self.settings = self._plain(tree)
        self.family, self.step_class = self._recognise(modules)
        for key in self.step_class.numbers:
            self._number(key)
        parts, objects = self.step_class.needs(modules, self.settings)
        for name in parts:
            if name not in modules:
                raise ValueError(
                    f"{path}: the losses that are switched on need {name} "
                    f"among the modules, which are {', '.join(modules)}."
                )
        self._objects = list(dict.fromkeys(objects))
        for key in ("opt_class", *self._objects):
            if key not in tree:
                raise ValueError(
                    f"{path} has no {key}, which the training step of a "
                    f"{self.family} recipe needs: add it."
                )
        self.modules = modules
        kept = _with_applied(tree, ["modules", "opt_class", *self._objects])
        for key in _unknown_in(kept):
            raise ValueError(self._ask_for(key))
        self._text = _dump(kept)
        self._augmentations = {
            name: tree[name]
            for name in self.step_class.augmentations
            if tree.get(name)
        }

    def build(self) -> TrainingStep:
        """Makes the network, its losses and what else the step calls.

        Under whatever mode is active, such as FakeTensorMode. (The meta device
        will not do for a transducer: SpeechBrain's recurrent networks read a
        number from a tensor.) Noises and echoes of the augmentation are not
        made; by how much it multiplies the batch is counted, see
        ``TrainingStep.copies``.

        Returns
        -------
        TrainingStep
            The step of its family, in training mode.

        Raises
        ------
        ValueError
            If a class cannot be imported or does not take its arguments.
        """
        made = self._make(self._text)
        for name, module in made["modules"].items():
            if not isinstance(module, Module):
                raise ValueError(
                    f"{self.path}: {name} of modules is {module!r} and no "
                    f"torch.nn.Module."
                )
        functions = {key: made[key] for key in self._objects}
        copies = {k: self._copies(k, v) for k, v in self._augmentations.items()}
        try:
            return self.step_class(
                made["modules"],
                functions,
                made["opt_class"],
                self.settings,
                copies,
            )
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def callee(self, module: str) -> str:
        """Finds the callable that makes a module.

        Arguments
        ---------
        module : str
            Its name among the modules.

        Returns
        -------
        str
            Name of the class or function; "" if neither makes it.
        """
        kind, _, path = _tag(self.modules[module]).partition(":")
        made = kind in ("!new", "!apply")
        return path if made and isinstance(self.modules[module], dict) else ""

    def arguments(self, module: str) -> dict[str, Any]:
        """Arguments that a module is made with; objects among them are made.

        Arguments
        ---------
        module : str
            Its name among the modules.

        Returns
        -------
        dict
            Keyword arguments.
        """
        node = {"arguments": dict(self.modules[module])}
        return self._make(_dump(node))["arguments"]

    def precision(self, given: str | None = None) -> str:
        """The precision to train in.

        Arguments
        ---------
        given : str, optional
            One that stands in place of the yaml file's.

        Returns
        -------
        str
            Such as "bf16"; "fp32" if nobody says.
        """
        if given is not None:
            return given
        return self.settings.get("precision") or "fp32"

    def default_batch(self, seconds: float | None = None) -> tuple[int, float]:
        """The batch that the yaml file asks for.

        Arguments
        ---------
        seconds : float, optional
            Length of the utterances, if it is not the recipe's.

        Returns
        -------
        tuple
            Utterances, seconds of each.
        """
        return self.step_class.default_batch(self._number, seconds)

    def own_variant(self) -> Variant:
        """The recipe as it is.

        Returns
        -------
        Variant
            Without a change, labelled by its network or loss.
        """
        return Variant(self.step_class.label(self))

    def variants(self) -> list[Variant]:
        """Alternatives to compare the recipe with.

        Speaker recipes: the vanilla network with all activations stored and
        with its blocks recomputed, and its reversible twins where there are
        any. Transducer recipes: the methods of the loss, the last one with
        the encoder's layers recomputed too.

        Returns
        -------
        list of Variant
            The recipe itself is among them.
        """
        return self.step_class.variants(self)

    def _plain(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Values without objects in them."""
        plain = {
            key: value
            for key, value in tree.items()
            if not any(_tag(node) for node in _nodes(value))
            and not _unknown_in(value)
        }
        return load_hyperpyyaml(_dump(plain)) if plain else {}

    def _recognise(
        self, modules: dict[str, Any]
    ) -> tuple[str, type[TrainingStep]]:
        for family, step in FAMILIES.items():
            if any(layout <= set(modules) for layout in step.layouts):
                return family, step
        raise ValueError(
            f"{self.path} has the modules {', '.join(modules)}, which are not "
            f"those of a known family ({' or '.join(FAMILIES)}): for any other "
            f"network give sb_memeff.memory.step.training_step_memory a step "
            f"function of your own."
        )

    def _number(self, key: str) -> Any:
        if key in self._placeholders:
            raise ValueError(self._ask_for(key))
        if key not in self.settings:
            raise ValueError(
                f"{self.path} has no number {key}, which the training step of "
                f"a {self.family} recipe needs: add it."
            )
        if not isinstance(self.settings[key], (int, float)):
            raise ValueError(
                f"{self.path}: {key} must be a number, not "
                f"{self.settings[key]!r}."
            )
        return self.settings[key]

    def _ask_for(self, key: str) -> str:
        return (
            f"{self.path}: {key} is a !PLACEHOLDER that the training step "
            f"needs: give it a value, --{key}=VALUE."
        )

    def _make(self, text: str) -> dict[str, Any]:
        """Makes the objects of a yaml text."""
        try:
            return load_hyperpyyaml(text)
        except (ImportError, pydoc.ErrorDuringImport) as error:
            raise ValueError(
                f"{self.path}: {_one_line(error)}: correct the name in the "
                f"yaml file, or install its package."
            ) from error
        except Exception as error:
            # Of anybody's class; hyperpyyaml puts its name before what it says.
            reason = ": ".join(map(str, error.args)) or type(error).__name__
            raise ValueError(f"{self.path}: {_one_line(reason)}") from error

    def _copies(self, name: str, node: Any) -> int:
        tag = _tag(node)
        if tag != "!new:speechbrain.augment.augmenter.Augmenter":
            logger.warning(
                f"{self.path}: {name} is {tag or node!r} and no Augmenter of "
                f"SpeechBrain; it is taken to leave the batch's size alone."
            )
            return 1
        if not isinstance(node, dict) or "augmentations" not in node:
            return 1
        arguments = {k: v for k, v in node.items() if k != "augmentations"}
        arguments = self._make(_dump({"arguments": arguments}))["arguments"]
        return largest_copies(len(node["augmentations"]), **arguments)


# --- reading -----------------------------------------------------------------


def _resolve(
    path: Path, overrides: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The tree of a yaml file, and the placeholders still in it."""
    # hyperpyyaml teaches ruamel tuples when it first loads something. Read
    # before that, (3, 3) is text, and written after that, quoted text.
    load_hyperpyyaml("first: 1")
    with open(path, encoding="utf-8") as f:
        raw = ruamel.yaml.YAML().load(f)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is no yaml file of keys and values.")
    values = {
        key: _override(path, raw, key, value)
        for key, value in overrides.items()
    }
    placeholders = [
        key
        for key, value in raw.items()
        if _tag(value) == "!PLACEHOLDER" and key not in values
    ]
    values.update({key: UNKNOWN.format(key) for key in placeholders})
    try:
        with open(path, encoding="utf-8") as f:
            text = resolve_references(f, values, overrides_must_match=True)
    except (ImportError, OSError, TypeError, ValueError) as error:
        # Of references, nested placeholders, !include and !applyref.
        raise ValueError(f"{path}: {_one_line(error)}") from error
    return ruamel.yaml.YAML().load(text), placeholders


def _override(path: Path, raw: dict[str, Any], key: str, value: Any) -> Any:
    if key not in raw:
        near = difflib.get_close_matches(key, list(raw))
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(f"{path} has no key {key} to override{hint}")
    tag = _tag(raw[key])
    if tag and tag not in ("!ref", "!copy", "!PLACEHOLDER"):
        raise ValueError(
            f"{key} of {path} is an object ({tag}), which an override cannot "
            f"replace (SpeechBrain's would keep the class): change it in the "
            f"yaml file."
        )
    if isinstance(value, str):
        # As hyperpyyaml reads what a command line holds.
        try:
            value = ruamel.yaml.YAML(typ="safe", pure=True).load(value)
        except ruamel.yaml.error.YAMLError as error:
            raise ValueError(
                f"--{key}={value}: not a plain value in yaml: "
                f"{_one_line(error)}."
            ) from error
    return value


def _one_line(error: Any) -> str:
    """Text of an error, without line breaks and pictures of the text."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


# --- trees of nodes ----------------------------------------------------------


def _tag(node: Any) -> str:
    """!new:..., !name:..., !apply:..., or nothing."""
    tag = getattr(getattr(node, "tag", None), "value", None) or ""
    return tag if tag.startswith("!") else ""


def _nodes(node: Any, seen: dict[int, Any] | None = None) -> Collection[Any]:
    """A node and all below it, each once."""
    seen = {} if seen is None else seen
    if id(node) not in seen:
        seen[id(node)] = node
        if isinstance(node, (dict, list)):
            below = node.values() if isinstance(node, dict) else node
            for child in below:
                _nodes(child, seen)
    return seen.values()


def _made(node: Any) -> set[int]:
    """The objects that constructing a node makes."""
    return {
        id(n) for n in _nodes(node) if _tag(n).startswith(("!new:", "!apply:"))
    }


def _with_applied(tree: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The keys, and every top-level !apply: that is given an object of theirs.

    It may change the object: a network whose blocks shall recompute.
    """
    never = {id(tree[key]) for key in NEVER if key in tree}
    kept = set(keys)
    made = set().union(*(_made(tree[key]) for key in kept))
    added = True
    while added:
        added = False
        for key, node in tree.items():
            if key in kept or not _tag(node).startswith("!apply:"):
                continue
            objects = _made(node)
            if objects & made and not objects & never:
                kept.add(key)
                made |= objects
                added = True
    return {key: tree[key] for key in tree if key in kept}


def _unknown_in(node: Any) -> list[str]:
    """The placeholders that are a part of some value of a tree."""
    return [
        key
        for leaf in _nodes(node)
        if isinstance(leaf, str)
        for key in re.findall(UNKNOWN.format("(.*?)"), leaf)
    ]


def _dump(tree: Any) -> str:
    """Yaml text, shared nodes as aliases."""
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(tree, stream)
    return stream.getvalue()

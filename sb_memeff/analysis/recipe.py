"""Builds the training step of a known recipe from its yaml file.

Only the objects that the step needs are constructed. No folder is created, no
checkpointer, augmentation or data set is constructed, nothing is downloaded and
no data is needed.

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
from sb_memeff.analysis.families.batching import (
    DynamicBatching,
    dynamic_batching,
)
from sb_memeff.analysis.families.step import (
    TrainingStep,
    Variant,
    class_label,
)

__all__ = ["Recipe", "read_recipe"]

logger = get_logger(__name__)

# Replaces a !PLACEHOLDER without an override.
PLACEHOLDER = "/PLACEHOLDER/{}/"
# Parts that some recipes have among the modules and others beside them.
BESIDE = ("compute_features", "normalize")
# Keys of the optimizer's class, in order of preference.
OPTIMIZERS = ("opt_class", "Adam", "model_opt_class")
# In Hz, unless the yaml file states another.
SAMPLE_RATE = 16000
# They create folders and download. Functions with these arguments are not called.
NOT_BUILT = ("checkpointer", "pretrainer", "train_logger")


def read_recipe(
    path: str | Path, overrides: dict[str, Any] | None = None
) -> "Recipe":
    """Reads a yaml file of a recipe of a known family.

    Its objects are not constructed until ``Recipe.build``.

    Arguments
    ---------
    path : str or Path
        SpeechBrain's or our VoxCeleb/SpeakerRec/hparams/train_*.yaml or
        LibriSpeech/ASR/transducer/hparams/*.yaml, another file of a family in
        sb_memeff.analysis.families, or a similar file.
    overrides : dict, optional
        Maps top-level keys to plain values. Strings are parsed as yaml, like
        a recipe's command line. Placeholders that the step does not need
        (folders) need no value.

    Returns
    -------
    Recipe
        The parsed recipe.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the yaml file is of another kind, an override has no key or
        replaces an object, or a key that the step needs is missing. The
        message names it.

    Example
    -------
    >>> path = "recipes/VoxCeleb/SpeakerRec_memeff/hparams/train_revnet.yaml"
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
    """A parsed training recipe; see ``read_recipe``.

    Arguments
    ---------
    path : Path
        The yaml file, for messages.
    tree : dict
        Its content, with references resolved.
    placeholders : collection of str
        Top-level placeholders without a value.

    Raises
    ------
    ValueError
        If its family is unknown, or a key that the step needs is missing.

    Attributes
    ----------
    family : str
        Such as "speaker" or "transducer"; a key of FAMILIES.
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
                f"{path} has no modules: it is not a yaml file for training "
                f"with SpeechBrain's Brain."
            )
        self.settings = self._plain(tree)
        self.family, self.step_class = self._recognise(modules, tree)
        if "sample_rate" not in tree:
            logger.warning(
                f"{path} has no sample_rate: {SAMPLE_RATE} Hz are assumed."
            )
            self.settings["sample_rate"] = SAMPLE_RATE
        for key in self.step_class.numbers:
            self.number(key)
        try:
            parts, objects = self.step_class.needs(modules, self.settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for name in parts:
            if name not in modules:
                raise ValueError(
                    f"{path}: the enabled losses need {name} "
                    f"among the modules, which are {', '.join(modules)}."
                )
        self._objects = [x for x in dict.fromkeys(objects) if x not in modules]
        self._optimizer = next(
            (key for key in OPTIMIZERS if key in tree), OPTIMIZERS[0]
        )
        for key in (self._optimizer, *self._objects):
            if key not in tree:
                raise ValueError(
                    f"{path} has no {key}, which the training step of a "
                    f"{self.family} recipe needs: add it."
                )
        self.modules = modules
        kept = _with_applied(tree, ["modules", self._optimizer, *self._objects])
        for key in _placeholders_in(kept):
            raise ValueError(self._placeholder_message(key))
        self._text = _dump(kept)
        self._augmentations = {
            name: tree[name]
            for name in self.step_class.augmentations
            if tree.get(name)
        }

    def build(self) -> TrainingStep:
        """Constructs the network, its losses and all other objects of the step.

        This works under any mode, such as FakeTensorMode. (It fails on the
        meta device for transducers: SpeechBrain's recurrent networks read a
        number from a tensor.) Augmentations are not constructed; only the
        factor by which they multiply the batch is computed, see
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
        objects = self._construct(self._text)
        for name, module in objects["modules"].items():
            if not isinstance(module, Module):
                raise ValueError(
                    f"{self.path}: {name} of modules is {module!r} and not a "
                    f"torch.nn.Module."
                )
        functions = {key: objects[key] for key in self._objects}
        copies = {k: self._copies(k, v) for k, v in self._augmentations.items()}
        try:
            return self.step_class(
                objects["modules"],
                functions,
                objects[self._optimizer],
                self.settings,
                copies,
            )
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def callee(self, module: str) -> str:
        """Finds the callable that constructs a module.

        Arguments
        ---------
        module : str
            Name of the module.

        Returns
        -------
        str
            Name of the class or function; "" if there is none.
        """
        kind, _, path = _tag(self.modules[module]).partition(":")
        called = kind in ("!new", "!apply")
        return path if called and isinstance(self.modules[module], dict) else ""

    def network(self, module: str) -> str:
        """Names the network of a module, for tables.

        Arguments
        ---------
        module : str
            Name of the module.

        Returns
        -------
        str
            Name of its class, or the module's if no class constructs it.
        """
        return class_label(self.callee(module)) or module

    def arguments(self, module: str) -> dict[str, Any]:
        """Constructs the arguments of a module.

        Arguments
        ---------
        module : str
            Name of the module.

        Returns
        -------
        dict
            Keyword arguments.
        """
        node = {"arguments": dict(self.modules[module])}
        return self._construct(_dump(node))["arguments"]

    def precision(self, given: str | None = None) -> str:
        """Returns the precision of the training.

        Arguments
        ---------
        given : str, optional
            Overrides the yaml file's.

        Returns
        -------
        str
            Such as "bf16"; the default is "fp32".
        """
        if given is not None:
            return given
        return self.settings.get("precision") or "fp32"

    def default_batch(self, seconds: float | None = None) -> tuple[int, float]:
        """Returns the batch of the yaml file.

        Arguments
        ---------
        seconds : float, optional
            Length of the utterances; the recipe's by default.

        Returns
        -------
        tuple
            Utterances, seconds of each.
        """
        return self.step_class.default_batch(self, seconds)

    @property
    def dynamic_batching(self) -> DynamicBatching | None:
        """The length of its dynamic batches; None if they have a size."""
        return dynamic_batching(self.settings)

    def own_variant(self) -> Variant:
        """Returns the unchanged recipe as a variant.

        Returns
        -------
        Variant
            A variant without a change, labelled by its network or loss.
        """
        return Variant(self.step_class.label(self))

    def variants(self) -> list[Variant]:
        """Lists the alternatives to compare the recipe with.

        Speaker recipes have the vanilla network, with stored activations and
        with recomputed blocks, and its reversible counterparts, if any.
        Transducer recipes have the methods of the loss, and the last method
        with recomputed encoder layers. Transformers have their layers
        recomputed.

        Returns
        -------
        list of Variant
            Includes the recipe itself.
        """
        return self.step_class.variants(self)

    def _plain(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The values that contain no objects."""
        plain = {
            key: value
            for key, value in tree.items()
            if not any(_tag(node) for node in _nodes(value))
            and not _placeholders_in(value)
        }
        return load_hyperpyyaml(_dump(plain)) if plain else {}

    def _recognise(
        self, modules: dict[str, Any], tree: dict[str, Any]
    ) -> tuple[str, type[TrainingStep]]:
        beside = {key for key in BESIDE if key in tree}
        for family, step in FAMILIES.items():
            if step.recognises(modules, beside):
                return family, step
        raise ValueError(
            f"{self.path} has the modules {', '.join(modules)}, which are not "
            f"those of a known family ({', '.join(FAMILIES)}): for any other "
            f"network pass a step function of your own to "
            f"sb_memeff.memory.step.training_step_memory."
        )

    def number(self, key: str, remedy: str = "add it") -> Any:
        """Returns a number of the yaml file.

        Arguments
        ---------
        key : str
            Its key.
        remedy : str
            What to do if there is no such key, for the message.

        Returns
        -------
        int or float
            The number.

        Raises
        ------
        ValueError
            If there is none.
        """
        if key in self._placeholders:
            raise ValueError(self._placeholder_message(key))
        if key not in self.settings:
            raise ValueError(
                f"{self.path} has no number {key}, which the training step of "
                f"a {self.family} recipe needs: {remedy}."
            )
        if not isinstance(self.settings[key], (int, float)):
            raise ValueError(
                f"{self.path}: {key} must be a number, not "
                f"{self.settings[key]!r}."
            )
        return self.settings[key]

    def _placeholder_message(self, key: str) -> str:
        return (
            f"{self.path}: {key} is a !PLACEHOLDER that the training step "
            f"needs: set it with --{key}=VALUE."
        )

    def _construct(self, text: str) -> dict[str, Any]:
        """Constructs the objects of a yaml text."""
        try:
            return load_hyperpyyaml(text)
        except (ImportError, pydoc.ErrorDuringImport) as error:
            raise ValueError(
                f"{self.path}: {_one_line(error)}: correct the name in the "
                f"yaml file, or install its package."
            ) from error
        except Exception as error:
            # Raised by any class; hyperpyyaml puts its name before the message.
            reason = ": ".join(map(str, error.args)) or type(error).__name__
            raise ValueError(f"{self.path}: {_one_line(reason)}") from error

    def _copies(self, name: str, node: Any) -> int:
        tag = _tag(node)
        if tag != "!new:speechbrain.augment.augmenter.Augmenter":
            logger.warning(
                f"{self.path}: {name} is {tag or node!r} and not SpeechBrain's "
                f"Augmenter. It is assumed to keep the batch size."
            )
            return 1
        if not isinstance(node, dict) or "augmentations" not in node:
            return 1
        arguments = {k: v for k, v in node.items() if k != "augmentations"}
        arguments = self._construct(_dump({"arguments": arguments}))[
            "arguments"
        ]
        return largest_copies(len(node["augmentations"]), **arguments)


# --- reading -----------------------------------------------------------------


def _resolve(
    path: Path, overrides: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The tree of a yaml file, and its placeholders without a value."""
    # hyperpyyaml registers tuples with ruamel on its first load. If (3, 3) is
    # read before that it is a string, and later dumped as a quoted string.
    load_hyperpyyaml("first: 1")
    with open(path, encoding="utf-8") as f:
        raw = ruamel.yaml.YAML().load(f)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a yaml file of keys and values.")
    values = {
        key: _override(path, raw, key, value)
        for key, value in overrides.items()
    }
    placeholders = [
        key
        for key, value in raw.items()
        if _tag(value) == "!PLACEHOLDER" and key not in values
    ]
    values.update({key: PLACEHOLDER.format(key) for key in placeholders})
    try:
        with open(path, encoding="utf-8") as f:
            text = resolve_references(f, values, overrides_must_match=True)
    except (ImportError, OSError, TypeError, ValueError) as error:
        # From references, nested placeholders, !include and !applyref.
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
        # As hyperpyyaml parses a command line.
        try:
            value = ruamel.yaml.YAML(typ="safe", pure=True).load(value)
        except ruamel.yaml.error.YAMLError as error:
            raise ValueError(
                f"--{key}={value}: not a plain value in yaml: "
                f"{_one_line(error)}."
            ) from error
    return value


def _one_line(error: Any) -> str:
    """An error's message on one line, without its excerpt of the file."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


# --- trees of nodes ----------------------------------------------------------


def _tag(node: Any) -> str:
    """!new:..., !name:..., !apply:..., or an empty string."""
    tag = getattr(getattr(node, "tag", None), "value", None) or ""
    return tag if tag.startswith("!") else ""


def _nodes(node: Any, visited: dict[int, Any] | None = None) -> Collection[Any]:
    """A node and all its descendants, each once."""
    visited = {} if visited is None else visited
    if id(node) not in visited:
        visited[id(node)] = node
        if isinstance(node, (dict, list)):
            children = node.values() if isinstance(node, dict) else node
            for child in children:
                _nodes(child, visited)
    return visited.values()


def _objects_in(node: Any) -> set[int]:
    """The ids of the nodes that construct objects."""
    return {
        id(n) for n in _nodes(node) if _tag(n).startswith(("!new:", "!apply:"))
    }


def _with_applied(tree: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The keys, and every top-level !apply: with one of their objects.

    Such a function may change the object, as ``recompute_blocks`` does.
    """
    not_built = {id(tree[key]) for key in NOT_BUILT if key in tree}
    kept = set(keys)
    used = set().union(*(_objects_in(tree[key]) for key in kept))
    added = True
    while added:
        added = False
        for key, node in tree.items():
            if key in kept or not _tag(node).startswith("!apply:"):
                continue
            objects = _objects_in(node)
            if objects & used and not objects & not_built:
                kept.add(key)
                used |= objects
                added = True
    return {key: tree[key] for key in tree if key in kept}


def _placeholders_in(node: Any) -> list[str]:
    """The placeholders within the values of a tree."""
    return [
        key
        for leaf in _nodes(node)
        if isinstance(leaf, str)
        for key in re.findall(PLACEHOLDER.format("(.*?)"), leaf)
    ]


def _dump(tree: Any) -> str:
    """Dumps a tree as yaml, with shared nodes as aliases."""
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(tree, stream)
    return stream.getvalue()

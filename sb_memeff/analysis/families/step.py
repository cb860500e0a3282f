"""Base class of training steps: a recipe's step without its Brain.

``forward`` does what the recipe's Brain does in training from the data loader to
the loss, and keeps the same tensors alive. The caller is responsible for
autocast, backward and the optimizer's step.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sb_memeff.nnet.recompute import recompute_blocks, store_blocks
from sb_memeff.nnet.recompute.fit import Recomputation
from sb_memeff.optim import keep_32bit_states

if TYPE_CHECKING:
    from sb_memeff.analysis.recipe import Recipe

__all__ = [
    "TrainingStep",
    "Variant",
    "class_label",
    "recomputed_variant",
    "require_positive",
]

# More samples are a typing error; torch counts bytes in 63 bits.
MOST_SAMPLES = 2**48


def require_positive(**numbers: float | None) -> None:
    """Raises unless all numbers are positive and finite.

    Arguments
    ---------
    **numbers : dict
        Maps names to numbers; None is ignored.

    Raises
    ------
    ValueError
        If one is not positive, infinite or not a number.

    Example
    -------
    >>> require_positive(batch=0)
    Traceback (most recent call last):
    ...
    ValueError: batch=0 must be positive and finite.
    """
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name}={number} must be positive and finite.")


@dataclass
class Variant:
    """One of several ways to train a recipe.

    Arguments
    ---------
    label : str
        Label in tables.
    change : callable, optional
        Changes a training step that the recipe has built.
    """

    label: str
    change: Callable[[Any], None] | None = None


def class_label(path: str) -> str:
    """Names a class in tables.

    Arguments
    ---------
    path : str
        Its full name.

    Returns
    -------
    str
        Its name, and whether it is SpeechBrain's.

    Example
    -------
    >>> class_label("speechbrain.lobes.models.ResNet.ResNet")
    "SpeechBrain's ResNet"
    """
    owner = "SpeechBrain's " if path.startswith("speechbrain.") else ""
    return owner + path.rpartition(".")[2]


def recomputed_variant(
    variant: Variant,
    blocks: Sequence[str],
    how: Recomputation,
    label: str,
) -> Variant:
    """Adds recomputed blocks to a variant.

    Arguments
    ---------
    variant : Variant
        The variant.
    blocks : list of str
        Names of blocks of the step.
    how : Recomputation
        Options.
    label : str
        What to add to the label.

    Returns
    -------
    Variant
        The new variant. Blocks that the yaml file recomputes are stored
        unless they are named.
    """

    def change(step: TrainingStep) -> None:
        if variant.change:
            variant.change(step)
        store_blocks(step)
        recompute_blocks(step, blocks, **how.options())

    return Variant(f"{variant.label}, {label}", change)


class TrainingStep(torch.nn.Module):
    """Base of the steps of all families.

    The yaml file's modules are submodules under the same names, such as
    ``step.enc``.

    Arguments
    ---------
    modules : dict
        The yaml file's modules, which Brain moves to the GPU and passes to
        the optimizer.
    functions : dict
        Other functions that ``forward`` calls, by name.
    opt_class : callable
        Makes an optimizer from parameters.
    settings : dict
        Plain values of the yaml file.
    copies : dict
        Maps an augmentation's name to the factor by which it multiplies a
        batch.
    """

    # A recipe of the family has all parts of one set: as modules or, where Brain
    # need not train them, beside the modules.
    layouts: tuple[set[str], ...] = ()
    # Further modules that a recipe may have; None if any.
    others: frozenset[str] | None = None
    # The augmentations that the recipe's Brain uses.
    augmentations: tuple[str, ...] = ("wav_augment",)
    # Top-level numbers of the yaml file that the step needs.
    numbers: tuple[str, ...] = ()
    # The smallest batch for training.
    min_batch = 1
    # Whether utterances have transcripts.
    has_transcripts = False
    # Modules of the yaml file to recompute; see ``recompute_blocks``.
    recomputable: tuple[str, ...] = ()

    def __init__(
        self,
        modules: dict[str, torch.nn.Module],
        functions: dict[str, Callable[..., Any]],
        opt_class: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        settings: dict[str, Any],
        copies: dict[str, int],
    ):
        super().__init__()
        self.settings = settings
        # Brain.fit_batch keeps the result of compute_forward alive through
        # backward, for example a transducer's logits.
        self.outputs: Any = None
        # The data loader's batch, so that callers can keep it alive as long.
        self.inputs: Any = None
        self._trained = list(modules)
        self._functions = functions
        self._opt_class = opt_class
        self._copies = copies
        for name, module in {**functions, **modules}.items():
            if isinstance(module, torch.nn.Module):
                if hasattr(self, name):
                    raise ValueError(
                        f"The name {name!r} of a module is reserved by the "
                        f"analysis: rename the module."
                    )
                self.add_module(name, module)

    @classmethod
    def recognises(cls, modules: Collection[str], beside: set[str]) -> bool:
        """Whether a recipe is of this family.

        Arguments
        ---------
        modules : collection of str
            Names of the yaml file's modules.
        beside : set of str
            Names of parts outside of them.

        Returns
        -------
        bool
            Whether it is.
        """
        parts = {*modules, *beside}
        return any(
            layout <= parts
            and (cls.others is None or set(modules) <= layout | cls.others)
            for layout in cls.layouts
        )

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """Lists keys that the step needs besides its layout and opt_class.

        Arguments
        ---------
        modules : collection of str
            Names of the yaml file's modules.
        settings : dict
            Its plain values.

        Returns
        -------
        tuple of list of str
            Modules that the settings require; objects, which may also be
            among the modules.

        Raises
        ------
        ValueError
            If the recipe's script does more than this step.
        """
        raise NotImplementedError

    @classmethod
    def default_batch(
        cls, recipe: "Recipe", seconds: float | None = None
    ) -> tuple[int, float]:
        """Returns the recipe's batch.

        Arguments
        ---------
        recipe : Recipe
            The recipe.
        seconds : float, optional
            Length of each utterance; the recipe's by default.

        Returns
        -------
        tuple
            Utterances, seconds.
        """
        raise NotImplementedError

    def batch(
        self, batch: int, seconds: float, tokens: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Makes a batch of noise, in the form of the data loader's.

        Arguments
        ---------
        batch : int
            Utterances.
        seconds : float
            Length of each.
        tokens : int, optional
            Length of each transcript, if there are transcripts.

        Returns
        -------
        tuple of torch.Tensor
            The arguments of ``forward``.
        """
        raise NotImplementedError

    @classmethod
    def label(cls, recipe: "Recipe") -> str:
        """Names the recipe's own network or loss, for tables.

        Arguments
        ---------
        recipe : Recipe
            The recipe.

        Returns
        -------
        str
            The name.
        """
        raise NotImplementedError

    @classmethod
    def variants(cls, recipe: "Recipe") -> list[Variant]:
        """Lists alternatives to the recipe, including itself.

        Arguments
        ---------
        recipe : Recipe
            The recipe.

        Returns
        -------
        list of Variant
            The variants, the recipe itself among them.
        """
        raise NotImplementedError

    @property
    def tokens(self) -> int | None:
        """Length of the transcripts of ``inputs``, if there are any."""
        return None

    def release_outputs(self) -> None:
        """Drops the result of the last forward, as Brain.fit_batch does."""
        self.outputs = None

    def imitate_gpu(self) -> None:
        """Replaces code that needs a GPU by code with the same memory."""

    @property
    def copies(self) -> int:
        """Factor by which augmentation multiplies the loader's batch."""
        result = 1
        for name in self.augmentations:
            result *= self._copies.get(name, 1)
        return result

    def optimizer(self) -> torch.optim.Optimizer:
        """Makes the recipe's optimizer, as Brain does.

        As in training, it includes parameters that no loss reaches, such as
        those of a language model among the modules.

        Returns
        -------
        torch.optim.Optimizer
            The optimizer of all parameters of the modules that need
            gradients.
        """
        modules = torch.nn.ModuleDict(
            {name: self.get_submodule(name) for name in self._trained}
        )
        keep_32bit_states(modules)
        return self._opt_class(
            [p for p in modules.parameters() if p.requires_grad]
        )

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or module of the yaml file."""
        if name in self._functions:
            return self._functions[name](*args, **kwargs)
        return self.get_submodule(name)(*args, **kwargs)

    def _augmented(
        self, name: str, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Repeats tensors as often as an augmentation does.

        Only the result is modelled. Temporaries of the augmentation are
        smaller than the waveforms, and those are small compared with a
        network's activations.
        """
        copies = self._copies.get(name, 1)
        if copies == 1:
            return tensors
        return tuple(torch.cat([x] * copies) for x in tensors)

    def _waveforms(
        self, batch: int, seconds: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise, and the relative lengths of utterances without padding."""
        require_positive(batch=batch, seconds=seconds)
        samples = round(seconds * self.settings["sample_rate"])
        if not 1 <= samples <= MOST_SAMPLES // batch:
            raise ValueError(
                f"A batch of {batch} utterances of {seconds} s is "
                f"{batch} x {samples} samples: use at least 1 and at "
                f"most {MOST_SAMPLES}."
            )
        device = next(self.parameters()).device
        wavs = 0.1 * torch.randn(batch, samples, device=device)
        return wavs, torch.ones(batch, device=device)

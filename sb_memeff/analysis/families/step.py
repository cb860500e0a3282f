"""The training step of a recipe, without its Brain: what all families share.

A step does in ``forward`` what the recipe's Brain does between the data loader
and the loss, in training, and holds what Brain holds meanwhile. Autocast,
backward and the optimizer's step are the caller's.

Authors
 * The sb_memeff authors 2026
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sb_memeff.optim import keep_32bit_states

if TYPE_CHECKING:
    from sb_memeff.analysis.recipe import Recipe

__all__ = ["TrainingStep", "Variant", "require_positive"]

# Waveforms beyond it are a slip of the keyboard; torch counts bytes in 63 bits.
MOST_SAMPLES = 2**48


def require_positive(**numbers: float | None) -> None:
    """Refuses what is no length and no number of utterances.

    Arguments
    ---------
    **numbers : dict
        Name to number; None is not given.

    Raises
    ------
    ValueError
        If one is not positive, or infinite, or not a number.

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
        For tables.
    change : callable, optional
        Changes a training step that the recipe has built.
    """

    label: str
    change: Callable[[Any], None] | None = None


class TrainingStep(torch.nn.Module):
    """Base of the steps of all families.

    Objects of the yaml file are submodules by their names there: ``step.enc``.

    Arguments
    ---------
    modules : dict
        The yaml file's modules: what Brain moves to the GPU and gives to the
        optimizer.
    functions : dict
        What else ``forward`` calls, by name.
    opt_class : callable
        From parameters to an optimizer.
    settings : dict
        Plain values of the yaml file.
    copies : dict
        Name of an augmentation to the number of batches it makes of one.
    """

    # The modules that tell the family: all of one of these sets.
    layouts: tuple[set[str], ...] = ()
    # The augmentations that its Brain looks for.
    augmentations: tuple[str, ...] = ("wav_augment",)
    # Top-level numbers of the yaml file that it reads.
    numbers: tuple[str, ...] = ()
    # The smallest batch that can be trained on.
    fewest = 1
    # Whether an utterance has a transcript, whose length can be given.
    has_transcripts = False

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
        # Brain.fit_batch holds what compute_forward gave until the batch is
        # done, through backward: the logits of a transducer, for one.
        self.outputs: Any = None
        # The data loader's batch, for callers that want it to live as long.
        self.inputs: Any = None
        self._trained = list(modules)
        self._functions = functions
        self._opt_class = opt_class
        self._copies = copies
        for name, module in {**functions, **modules}.items():
            if isinstance(module, torch.nn.Module):
                if hasattr(self, name):
                    raise ValueError(
                        f"modules names one {name!r}, which the analysis uses "
                        f"otherwise: give it another name."
                    )
                self.add_module(name, module)

    @classmethod
    def needs(
        cls, modules: Collection[str], settings: dict[str, Any]
    ) -> tuple[list[str], list[str]]:
        """Keys that the step needs besides its modules and opt_class.

        Arguments
        ---------
        modules : collection of str
            Names of the yaml file's modules.
        settings : dict
            Its plain values.

        Returns
        -------
        tuple of list of str
            Modules that the settings ask for; objects outside the modules.
        """
        raise NotImplementedError

    @classmethod
    def default_batch(
        cls, number: Callable[[str], Any], seconds: float | None = None
    ) -> tuple[int, float]:
        """The recipe's own batch.

        Arguments
        ---------
        number : callable
            From a key to that number of the yaml file.
        seconds : float, optional
            Length of each utterance, if it is not the recipe's.

        Returns
        -------
        tuple
            Utterances, seconds.
        """
        raise NotImplementedError

    def batch(
        self, batch: int, seconds: float, tokens: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """A batch as a data loader gives it, of noise.

        Arguments
        ---------
        batch : int
            Utterances.
        seconds : float
            Length of each.
        tokens : int, optional
            Length of each transcript, where there are transcripts.

        Returns
        -------
        tuple of torch.Tensor
            What ``forward`` takes.
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
        """Alternatives to compare the recipe with, itself among them.

        Arguments
        ---------
        recipe : Recipe
            The recipe.

        Returns
        -------
        list of Variant
            At least the recipe itself.
        """
        raise NotImplementedError

    @property
    def tokens(self) -> int | None:
        """Length of the transcripts of ``inputs``, if there are any."""
        return None

    def imitate_gpu(self) -> None:
        """Puts stand-ins of the same memory where code needs a GPU to run."""

    @property
    def copies(self) -> int:
        """Rows of a batch in the network for each row of the loader's."""
        result = 1
        for name in self.augmentations:
            result *= self._copies.get(name, 1)
        return result

    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's optimizer, as Brain makes it.

        Parameters that no loss reaches (those of a language model among the
        modules) belong to it, as they do in training.

        Returns
        -------
        torch.optim.Optimizer
            For all of the modules' parameters that need gradients.
        """
        modules = torch.nn.ModuleDict(
            {name: self.get_submodule(name) for name in self._trained}
        )
        keep_32bit_states(modules)
        return self._opt_class(
            [p for p in modules.parameters() if p.requires_grad]
        )

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of the yaml file."""
        return self._functions[name](*args, **kwargs)

    def _augmented(
        self, name: str, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The tensors as often as an augmentation gives them out.

        The concatenation alone: what augmenting itself needs in between is a
        part of the size of the waveforms, and those are small beside a
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
                f"{batch} x {samples} samples: give 1 at least, and "
                f"{MOST_SAMPLES} at most."
            )
        device = next(self.parameters()).device
        wavs = 0.1 * torch.randn(batch, samples, device=device)
        return wavs, torch.ones(batch, device=device)

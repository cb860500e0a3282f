"""Networks by their published names.

Authors
 * The sb_memeff authors 2026
"""

from typing import Any, ClassVar, TypeVar

__all__ = ["Presets"]

_Network = TypeVar("_Network", bound="Presets")


class Presets:
    """Adds ``from_preset`` to a network class that lists its PRESETS."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def from_preset(
        cls: type[_Network], name: str, **overrides: Any
    ) -> _Network:
        """Builds a network by name.

        Arguments
        ---------
        name : str
            A key of the class's PRESETS.
        **overrides : dict
            Arguments of the class that replace those of the preset.

        Returns
        -------
        torch.nn.Module
            The network.

        Raises
        ------
        ValueError
            If the name is unknown; the message lists the presets.
        """
        if name not in cls.PRESETS:
            raise ValueError(
                f"{cls.__name__} has no preset {name!r}; it has "
                f"{', '.join(cls.PRESETS)}."
            )
        return cls(**cls.preset_arguments(name, **overrides))

    @classmethod
    def preset_arguments(cls, name: str, **overrides: Any) -> dict[str, Any]:
        """The arguments of a preset.

        Arguments
        ---------
        name : str
            A key of the class's PRESETS.
        **overrides : dict
            Arguments that replace those of the preset.

        Returns
        -------
        dict
            Keyword arguments of the class.
        """
        return {**cls.PRESETS[name], **overrides}

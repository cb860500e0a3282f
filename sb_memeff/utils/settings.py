"""Checks of settings.

Authors
 * The sb_memeff authors 2026
"""

import math
import numbers

__all__ = ["check_integer", "check_number", "check_switches"]


def check_integer(
    name: str, value: object, least: int, most: int | None = None
) -> None:
    """Raises an error if a setting is not an integer in a range.

    True is not one, although Python counts it as 1.

    Arguments
    ---------
    name : str
        Of the setting, for the message.
    value : object
        Its value.
    least : int
        The smallest that is allowed.
    most : int, optional
        The largest that is allowed.

    Raises
    ------
    ValueError
        If it is not. The message names it.

    Example
    -------
    >>> check_integer("split", 2, least=1)
    >>> check_integer("split", True, least=1)
    Traceback (most recent call last):
        ...
    ValueError: split=True must be an integer of at least 1.
    """
    valid = False
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        valid = least <= int(value) <= (math.inf if most is None else most)
    if not valid:
        bounds = f"of at least {least}"
        if most is not None:
            bounds = f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} must be an integer {bounds}.")


def check_number(
    name: str,
    value: object,
    least: float = -math.inf,
    below: float = math.inf,
    above: float = -math.inf,
) -> None:
    """Raises an error if a setting is not a number in a range.

    Arguments
    ---------
    name : str
        Of the setting, for the message.
    value : object
        Its value.
    least : float
        The smallest that is allowed.
    below : float
        All smaller numbers are allowed.
    above : float
        All larger numbers are allowed.

    Raises
    ------
    ValueError
        If it is not. The message names it.

    Example
    -------
    >>> check_number("every", 1.5, least=1)
    >>> check_number("every", "1.5", least=1)
    Traceback (most recent call last):
        ...
    ValueError: every='1.5' must be a finite number of at least 1.
    """
    valid = False
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        valid = least <= number < below and above < number
    if not valid:
        bounds = []
        if least > -math.inf:
            bounds.append(f"of at least {least:g}")
        if above > -math.inf:
            bounds.append(f"above {above:g}")
        if below < math.inf:
            bounds.append(f"below {below:g}")
        text = " and ".join(bounds)
        raise ValueError(
            f"{name}={value!r} must be a finite number {text}".rstrip() + "."
        )


def check_switches(**settings: object) -> None:
    """Raises an error if a switch is not a truth value.

    hyperpyyaml reads ``no`` and ``off`` as text, which Python takes for true.

    Arguments
    ---------
    **settings : dict
        Values by name.

    Raises
    ------
    TypeError
        If one is neither True nor False. The message names it.

    Example
    -------
    >>> check_switches(enabled=True)
    >>> check_switches(enabled="no")
    Traceback (most recent call last):
        ...
    TypeError: enabled='no' must be True or False (in yaml, no and off are text).
    """
    for name, value in settings.items():
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            hint = " (in yaml, no and off are text)"
            raise TypeError(
                f"{name}={value!r} must be True or False"
                f"{hint if isinstance(value, str) else ''}."
            )

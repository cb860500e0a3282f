"""Checks of settings.

Authors
 * The sb_memeff authors 2026
"""

__all__ = ["check_switches"]


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

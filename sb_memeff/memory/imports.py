"""Run code around each module that is imported meanwhile.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import importlib.abc
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

__all__ = ["around_imports"]


@contextlib.contextmanager
def around_imports(
    context: Callable[[ModuleType], AbstractContextManager[Any]],
) -> Generator[None, None, None]:
    """Executes modules that are imported meanwhile inside a context.

    Networks import lazily, so the first analysis may be the first import. A
    constant that a module makes then must not be a fake tensor.

    Arguments
    ---------
    context : callable
        From the module to a context manager. What a module imports in turn is
        executed inside it too; it is not entered twice.

    Example
    -------
    >>> sys.modules.pop("this", None) and None
    >>> quiet = lambda module: contextlib.redirect_stdout(None)
    >>> with around_imports(quiet):
    ...     import this
    """
    finder = _Finder(context)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the other finders find."""

    def __init__(
        self, context: Callable[[ModuleType], AbstractContextManager[Any]]
    ):
        self.context = context
        self.busy = False

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """The spec of the first finder that has one, its loader wrapped."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(cast(Loader, spec.loader), self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Executes a module inside the context, and leaves no trace."""

    def __init__(self, loader: Loader, finder: _Finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the loader does, inside the context."""
        spec = cast(ModuleSpec, module.__spec__)
        spec.loader = module.__loader__ = self.loader
        if self.finder.busy:
            self.loader.exec_module(module)
            return
        self.finder.busy = True
        try:
            with self.finder.context(module):
                self.loader.exec_module(module)
        finally:
            self.finder.busy = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

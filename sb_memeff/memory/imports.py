"""Executes imported modules within a context.

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
    """Executes modules that are imported in the meantime within a context.

    Networks import lazily, so an analysis may import a module for the first
    time. The module's constants must not be fake tensors.

    Arguments
    ---------
    context : callable
        Makes a context manager for a module. Modules that it imports in turn
        are executed in the same context, which is not entered twice.

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
    """Wraps the loaders that the other finders find."""

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
        """Returns the first finder's spec, with a wrapped loader."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(cast(Loader, spec.loader), self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Executes a module within the context, then restores its own loader."""

    def __init__(self, loader: Loader, finder: _Finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See importlib.abc.Loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See importlib.abc.Loader; runs within the context."""
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

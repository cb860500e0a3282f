"""Run code around each module that is imported meanwhile.

Authors
 * The sb_memeff authors 2026
"""

import contextlib
import importlib.abc
import sys

__all__ = ["around_imports"]


@contextlib.contextmanager
def around_imports(context):
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

    def __init__(self, context):
        self.context = context
        self.busy = False

    def find_spec(self, name, path, target=None):
        """The spec of the first finder that has one, its loader wrapped."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Executes a module inside the context, and leaves no trace."""

    def __init__(self, loader, finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec):
        """As the loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module):
        """As the loader does, inside the context."""
        module.__spec__.loader = module.__loader__ = self.loader
        if self.finder.busy:
            self.loader.exec_module(module)
            return
        self.finder.busy = True
        try:
            with self.finder.context(module):
                self.loader.exec_module(module)
        finally:
            self.finder.busy = False

    def __getattr__(self, name):
        return getattr(self.loader, name)

"""Embeddings that are computed once and kept in a folder.

Authors
 * The sb_memeff authors 2026
"""

import hashlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from speechbrain.utils.distributed import (
    ddp_barrier,
    is_distributed_initialized,
)

from sb_memeff.dataio.preparation import atomic_path

__all__ = ["EmbeddingStore", "fingerprint"]

# Utterances in a file; a killed run loses fewer.
SHARD = 2048


class EmbeddingStore:
    """Embeddings in files of a folder.

    A killed run continues where it stopped, and lists of trials that share
    utterances share their embeddings. Several processes of one run compute a
    share each; several runs may use a folder at the same time.

    Arguments
    ---------
    folder : str or Path
        Folder of one model: see ``fingerprint``. Created if needed.

    Example
    -------
    >>> store = EmbeddingStore(getfixture("tmpdir"))
    >>> def compute(names):
    ...     print("computes", names)
    ...     for name in names:
    ...         yield [name], torch.full((1, 2), float(len(name)))
    >>> store.get(["a", "bb"], compute)
    computes ['a', 'bb']
    tensor([[1., 1.],
            [2., 2.]])
    >>> store.get(["bb"], compute)
    tensor([[2., 2.]])
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(
        self,
        names: Sequence[str],
        compute: Callable[
            [list[str]], Iterable[tuple[Sequence[str], torch.Tensor]]
        ],
        together: int = 1,
    ) -> torch.Tensor:
        """Reads embeddings, and computes those that are missing.

        With torch.distributed all processes must call it.

        Arguments
        ---------
        names : list of str
            Names of utterances, without repetition.
        compute : callable
            Maps the missing names to batches: names, in any order, and
            embeddings [batch, dimensions].
        together : int
            So many consecutive names are computed by one process: the batch
            size, if padding should be that of a single process.

        Returns
        -------
        torch.Tensor
            [names, dimensions] in float32, on the CPU.

        Raises
        ------
        RuntimeError
            If files disappear meanwhile.
        """
        known = set()
        for path in self._shards():
            known.update(torch.load(path, mmap=True, weights_only=True)[0])
        missing = [name for name in names if name not in known]
        # All have looked before one writes, so that the shares fit together.
        ddp_barrier()
        share = _own_share(missing, together)
        if share:
            self._save(compute(share))
        ddp_barrier()
        return self._read(names)

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.pt"))

    def _save(
        self, batches: Iterable[tuple[Sequence[str], torch.Tensor]]
    ) -> None:
        names: list[str] = []
        rows: list[torch.Tensor] = []
        for batch_names, embeddings in batches:
            names += batch_names
            rows.append(embeddings.float().cpu())
            if len(names) >= SHARD:
                self._write(names, rows)
                names, rows = [], []
        if names:
            self._write(names, rows)

    def _write(self, names: list[str], rows: list[torch.Tensor]) -> None:
        # No other process or run writes a file of this name.
        path = self.folder / f"{uuid.uuid4().hex}.pt"
        with atomic_path(path) as partial:
            torch.save((names, torch.cat(rows)), partial)

    def _read(self, names: Sequence[str]) -> torch.Tensor:
        rows = {name: row for row, name in enumerate(names)}
        result, found = (
            torch.empty(0),
            torch.zeros(len(names), dtype=torch.bool),
        )
        for path in self._shards():
            there, embeddings = torch.load(path, weights_only=True)
            kept = [(rows[n], k) for k, n in enumerate(there) if n in rows]
            if not kept:
                continue
            if not len(result):
                result = torch.empty(len(names), embeddings.shape[1])
            to, source = (torch.tensor(index) for index in zip(*kept))
            result[to] = embeddings[source]
            found[to] = True
        if not found.all():
            raise RuntimeError(
                f"{self.folder} lacks {int((~found).sum())} embeddings that were "
                f"there or have been computed: do not delete its files during a "
                f"run, and run again."
            )
        return result


def _own_share(names: list[str], together: int) -> list[str]:
    """The names that this process computes."""
    if not is_distributed_initialized():
        return names
    rank = torch.distributed.get_rank()
    step = together * torch.distributed.get_world_size()
    starts = range(rank * together, len(names), step)
    return [name for n in starts for name in names[n : n + together]]


def fingerprint(modules: Iterable[torch.nn.Module]) -> str:
    """Digest of modules: their weights and their settings.

    Arguments
    ---------
    modules : iterable of torch.nn.Module
        The modules that turn a waveform into an embedding.

    Returns
    -------
    str
        16 hexadecimal digits.

    Example
    -------
    >>> net = torch.nn.Linear(2, 2)
    >>> before = fingerprint([net])
    >>> _ = torch.nn.init.zeros_(net.weight)
    >>> before == fingerprint([net])
    False
    """
    digest = hashlib.sha256()
    for root in modules:
        for name, module in root.named_modules():
            settings = {
                key: value
                for key, value in sorted(vars(module).items())
                if isinstance(value, (bool, int, float, str, tuple))
                and key != "training"
            }
            digest.update(f"{name} {type(module)} {settings}".encode())
        for name, value in root.state_dict().items():
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                value = value.detach().cpu().contiguous().flatten()
                digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

"""Detects that a second computation differs from the first.

Recomputation and inversion are exact only if backward repeats the arithmetic of
forward: the same algorithms of cuDNN, the same random numbers, the same state. A
checksum reads each result once. Forward stores it, and backward compares. On the
CPU a difference raises an error at once. On an accelerator the comparisons stay on
the device. When the next step begins, one copy transfers those of the last step to
the host, which reads them when it need not wait, at the latest in the next
backward pass.

Authors
 * The sb_memeff authors 2026
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from speechbrain.utils.logger import get_logger

from sb_memeff.ops.summary import checksum

if TYPE_CHECKING:
    # Of Python 3.10.
    from typing import TypeGuard

__all__ = [
    "Summary",
    "is_read_at_once",
    "mismatch_action",
    "next_forward",
    "read_arrived",
    "read_mismatches",
    "report_mismatches",
    "set_mismatch_action",
]

logger = get_logger(__name__)

# Number of values of a tensor kept to measure the size of a difference.
SAMPLE = 1024


class Summary:
    """Summary of tensors in forward, for comparison in backward.

    It contains a checksum of each tensor. If a difference is expected or not an
    error, it also contains a sample of the values, to measure its size.

    Arguments
    ---------
    leaves : iterable
        Tensors; other objects are skipped.
    sampled : bool, optional
        Whether to keep a sample too. By default only if the action is
        "warn".
    sums : list of torch.Tensor, optional
        Checksums of the tensors, if they are known.

    Example
    -------
    >>> x = torch.ones(3)
    >>> before = Summary([x])
    >>> before.differs(before.summarize([x + 1]))
    tensor(True)
    """

    def __init__(
        self,
        leaves: Iterable[object],
        sampled: bool | None = None,
        sums: list[torch.Tensor] | None = None,
    ):
        if sampled is None:
            sampled = mismatch_action() == "warn"
        tensors = [x for x in leaves if _is_plain(x)]
        self.sampled = sampled
        self.sums = [checksum(x) for x in tensors] if sums is None else sums
        self.samples = [sample(x) for x in tensors] if sampled else []

    def summarize(self, leaves: Iterable[object]) -> Summary:
        """Summarizes other tensors in the same way."""
        return Summary(leaves, self.sampled)

    def differs(self, other: Summary) -> torch.Tensor:
        """Whether a bit differs, as a boolean scalar on the tensors' device."""
        if not self.sums:
            return torch.tensor(False)
        device = self.sums[0].device
        if len(self.sums) != len(other.sums):
            return torch.tensor(True, device=device)
        return torch.stack(
            [(a != b).to(device) for a, b in zip(self.sums, other.sums)]
        ).any()

    @staticmethod
    def differ(pairs: Sequence[tuple[Summary, Summary]]) -> torch.Tensor:
        """Compares many pairs of summaries in few operations.

        Arguments
        ---------
        pairs : sequence of tuple
            Two summaries each. All summarize as many tensors, on one device.

        Returns
        -------
        torch.Tensor
            [N], bool: whether the summaries of each pair differ.
        """
        before, now = (
            torch.stack([x for summary in side for x in summary.sums])
            for side in zip(*pairs)
        )
        return (before != now).view(len(pairs), -1).any(1)

    def relative_error(self, other: Summary) -> torch.Tensor:
        """Largest difference of a sampled value, relative to the largest."""
        pairs = list(zip(self.samples, other.samples))
        return torch.stack(
            [
                (a - b).abs().amax() / a.abs().amax().clamp(min=1e-30)
                for a, b in pairs
                if a.numel()
            ]
            or [torch.zeros(())]
        ).amax()

    def size_of_difference(self, other: Summary) -> str:
        """The size as text for a message; empty without samples."""
        if not self.samples:
            return ""
        error = self.relative_error(other).item()
        return f" by {error:.2g} of the largest value (in a sample)"


def _is_plain(x: Any) -> TypeGuard[torch.Tensor]:
    return type(x) in (torch.Tensor, torch.nn.Parameter) and (
        x.layout == torch.strided
    )


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Copies some values of a tensor.

    Arguments
    ---------
    tensor : torch.Tensor
        Any shape and strides.

    Returns
    -------
    torch.Tensor
        At most 1,024 values, spread over all axes, in float32 or float64.

    Example
    -------
    >>> sample(torch.rand(100, 100, 100)).numel() <= 1024
    True
    """
    tensor, room = tensor.detach(), SAMPLE
    for axis in range(tensor.dim()):
        most = max(1, int(room ** (1 / (tensor.dim() - axis)) + 1e-9))
        step = max(1, -(-tensor.shape[axis] // most))
        tensor = tensor[(slice(None),) * axis + (slice(None, None, step),)]
        room //= max(1, tensor.shape[axis])
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    # A copy, because a view would keep the whole tensor alive.
    return tensor.flatten().to(wide, copy=True)


def set_mismatch_action(action: Literal["error", "warn"]) -> None:
    """Sets the consequence of a difference between forward and backward.

    In a yaml file: ``__mismatch: !apply:
    sb_memeff.nnet.replay.set_mismatch_action [warn]``.

    Arguments
    ---------
    action : str
        "error" raises a RuntimeError. "warn" logs each message once and
        continues training with inexact gradients.

    Raises
    ------
    ValueError
        For any other action.

    Example
    -------
    >>> set_mismatch_action("error")
    """
    if action not in ("error", "warn"):
        raise ValueError(
            f"set_mismatch_action: action must be 'error' or 'warn', got "
            f"{action!r}."
        )
    _pending.action = action


def mismatch_action() -> Literal["error", "warn"]:
    """Returns the consequence of a difference; see ``set_mismatch_action``.

    Returns
    -------
    str
        "error" or "warn".
    """
    return _pending.action


def report_mismatches(
    differs: torch.Tensor, describe: Callable[[int], str]
) -> None:
    """Registers results of comparisons; raises for known differences.

    Arguments
    ---------
    differs : torch.Tensor
        [N], bool, on the device of the computation.
    describe : callable
        Makes the error message from the index of a comparison. It is called
        when the host reads the results, so it must not hold large tensors.

    Raises
    ------
    RuntimeError
        If a comparison differs: one of these if they are on the CPU, or one
        of an earlier step.

    Example
    -------
    >>> report_mismatches(torch.tensor([False, True]), "block {}".format)
    Traceback (most recent call last):
        ...
    RuntimeError: block 1
    """
    _pending.report(differs, describe)


def next_forward() -> None:
    """Marks the start of a forward pass; earlier reports are complete.

    Raises
    ------
    RuntimeError
        If a comparison that has arrived at the host differs.
    """
    _pending.next_forward()


def read_arrived() -> None:
    """Raises for known differences, without waiting.

    Raises
    ------
    RuntimeError
        If a comparison that has arrived at the host differs.
    """
    _pending.read_arrived()


def read_mismatches() -> None:
    """Waits for all comparisons and raises if one differs.

    ``MemEffBrain`` calls it once a step, where SpeechBrain waits for the loss
    anyway. In your own training loop call it after the last step.

    Raises
    ------
    RuntimeError
        If a comparison differs.

    Example
    -------
    >>> read_mismatches()
    """
    _pending.read()


def is_read_at_once(device: torch.device) -> bool:
    """Checks that the host can read values of a device without waiting.

    Arguments
    ---------
    device : torch.device
        Device of the value.

    Returns
    -------
    bool
        True for the CPU.
    """
    return device.type == "cpu"


@dataclasses.dataclass(eq=False)
class _Report:
    """Comparisons of one call, still on their device."""

    differs: torch.Tensor
    describe: Callable[[int], str]


@dataclasses.dataclass(eq=False)
class _Copy:
    """Comparisons of one step, being copied to the host."""

    host: torch.Tensor
    event: torch.cuda.Event | _Arrived
    reports: list[_Report]


class _Pending:
    """Comparisons that the host has not read yet.

    Arguments
    ---------
    copy : callable
        Starts a copy of a tensor to the host; returns the copy and an event
        with ``query`` and ``synchronize``.
    at_once : callable
        Whether comparisons on a device are read at once.
    """

    def __init__(
        self,
        copy: Callable[
            [torch.Tensor], tuple[torch.Tensor, torch.cuda.Event | _Arrived]
        ],
        at_once: Callable[[torch.device], bool] = lambda device: False,
    ):
        self.action: Literal["error", "warn"] = "error"
        self._copy = copy
        self._at_once = at_once
        # Reports of the current step, and copies of earlier steps.
        self._reports: list[_Report] = []
        self._copies: list[_Copy] = []
        self._warned: set[str] = set()

    def report(
        self, differs: torch.Tensor, describe: Callable[[int], str]
    ) -> None:
        """See the function report_mismatches."""
        report = _Report(differs, describe)
        if self._at_once(differs.device):
            self._judge([report], differs)
        else:
            self._reports.append(report)
        # Copies of earlier steps. The host is at most one step ahead of the
        # device, so this rarely waits.
        self._read(lambda copy: True)

    def next_forward(self) -> None:
        """See the function next_forward."""
        self._send()
        self.read_arrived()

    def read_arrived(self) -> None:
        """See the function read_arrived."""
        self._read(lambda copy: copy.event.query())

    def read(self) -> None:
        """See the function read_mismatches."""
        self._send()
        self._read(lambda copy: True)

    def _send(self) -> None:
        reports, self._reports = self._reports, []
        for device in dict.fromkeys(r.differs.device for r in reports):
            of_device = [r for r in reports if r.differs.device == device]
            # A single copy, because each allocates pinned memory, which takes
            # longer than a block's computation.
            differs = torch.cat([r.differs for r in of_device])
            self._copies.append(_Copy(*self._copy(differs), of_device))

    def _read(self, due: Callable[[_Copy], bool]) -> None:
        ready = [copy for copy in self._copies if due(copy)]
        self._copies = [copy for copy in self._copies if copy not in ready]
        for copy in ready:
            copy.event.synchronize()
            self._judge(copy.reports, copy.host)

    def _judge(self, reports: list[_Report], differs: torch.Tensor) -> None:
        if not differs.any():
            return
        sizes = [report.differs.numel() for report in reports]
        for report, part in zip(reports, differs.split(sizes)):
            for number in part.nonzero().flatten().tolist():
                self._act(report.describe(number))

    def _act(self, message: str) -> None:
        if self.action == "error":
            # The first difference is enough.
            self._reports.clear()
            self._copies.clear()
            raise RuntimeError(message)
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


class _Arrived:
    """The event of a finished copy."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _copy_to_host(
    tensor: torch.Tensor,
) -> tuple[torch.Tensor, torch.cuda.Event | _Arrived]:
    if tensor.device.type != "cuda":
        return tensor.cpu(), _Arrived()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return host, event


_pending = _Pending(_copy_to_host, is_read_at_once)

"""The start under torchrun.

Authors
 * The sb_memeff authors 2026
"""

import pytest
import speechbrain as sb

from sb_memeff.utils.launch import init_processes


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(
        sb.utils.distributed, "ddp_init_group", lambda opts: found.append(opts)
    )
    return found


def test_a_process_without_a_gpu(calls, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        ValueError, match="there are 1 for process 1: .*backend=gloo"
    ):
        init_processes({"distributed_backend": "nccl"})
    assert not calls
    monkeypatch.setenv("LOCAL_RANK", "0")
    for backend in ("nccl", "gloo"):
        init_processes({"distributed_backend": backend})
    assert len(calls) == 2


def test_a_single_process(calls, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    init_processes({"distributed_backend": "nccl"})
    assert not calls

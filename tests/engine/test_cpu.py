"""Memory that a training on the CPU keeps, and what it says about a slow machine."""

import os
import subprocess
import sys

import pytest
import torch

from scratch_det.engine.cpu import BFLOAT16, cpu_notices

FAULTS = """
import resource, torch
from scratch_det.engine.cpu import keep_freed_memory
keep_freed_memory()
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt for _ in range(8) if torch.ones(10_000_000).sum()]
print(min(later - earlier for earlier, later in zip(faults, faults[1:])))  # others' pages may come in between
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again() -> None:
    """40 MB are 9,766 pages, or 20 when they are huge."""
    words = [sys.executable, "-c", FAULTS]
    run = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 5


class TestNotices:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two threads a process on 4 cores, 1.2 of them busy, with bfloat16."""
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
        monkeypatch.setattr(os, "getloadavg", lambda: (1.2, 4.0, 4.0))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)

    def test_none_where_cores_are_free_and_bfloat16_is_fast(self) -> None:
        assert list(cpu_notices(1, bfloat16=True)) == []

    def test_threads_without_a_free_core(self) -> None:
        (notice,) = cpu_notices(2, bfloat16=False)
        assert "4 threads will train on 4 cores, where 1.2 others were running" in notice
        assert notice.endswith("set OMP_NUM_THREADS=1")

    def test_the_load_of_other_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3}, raising=False)
        assert list(cpu_notices(2, bfloat16=False)) == []

    def test_one_thread_has_nothing_to_change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert list(cpu_notices(4, bfloat16=False)) == []

    def test_emulated_bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        none = {"cpu_name": "Old CPU", **dict.fromkeys(BFLOAT16, False)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: none, raising=False)
        assert list(cpu_notices(1, bfloat16=False)) == []
        (notice,) = cpu_notices(1, bfloat16=True)
        assert "the CPU (Old CPU) has no bfloat16" in notice
        assert notice.endswith("set SOLVER.AMP.ENABLED False")

"""The progress of long work."""

import pytest

from scratch_det.log import Progress


def test_an_eta_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("scratch_det.log.time.monotonic", lambda: now)
    with Progress("training", total=10, say=None) as progress:
        now += 2
        progress.advance()
        assert progress.eta() == "eta 0:00:18"
        with progress.paused("evaluating"):
            now += 600
        assert progress.eta() == "eta 0:00:18"

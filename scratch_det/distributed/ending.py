"""How a process that was started for a run came to its end, in words."""

import signal

from scratch_det.distributed.stop import EXIT_PREEMPTED

STOPPED = (EXIT_PREEMPTED, 128 + signal.SIGINT)  # exit codes of a run that was asked to stop and can be continued


def last_word(said: str, code: int) -> str:
    """The message of a refusal, or else the last line of a traceback; for a signal its name."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    refusal = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return f"exit code {code}: {refusal.removeprefix('error: ')}"

"""Stub programs in the place of SLURM's."""

from pathlib import Path

SUBMITTED = 'echo "$@" >> {0}/submitted; wc -l < {0}/submitted'  # an sbatch that says 1, 2, 3, ...


def script(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def submitted(programs: Path) -> dict[str, list[str]]:
    """sbatch's words by the name of the script."""
    lines = [line.split() for line in (programs / "submitted").read_text().splitlines()]
    return {Path(words[-1]).stem: words[:-1] for words in lines}


def queue(programs: Path, *jobs: str) -> None:
    """What squeue shows: ID STATE NAME COMMENT of each job."""
    script(programs, "squeue", "\n".join(["cat << END", *jobs, "END"]))

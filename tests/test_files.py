"""Files that several processes write."""

import os
from pathlib import Path

from scratch_det.files import write_atomically


def test_several_write_one_file_at_once(tmp_path: Path) -> None:
    """As several reports of one study: each writes a file of its own and renames that."""
    path, contents = tmp_path / "page.html", [f"{number}" * 100_000 for number in range(6)]
    writers = []
    for content in contents:
        if not (pid := os.fork()):
            try:
                for _ in range(20):
                    write_atomically(path, content)
                    assert path.read_text() in contents
            except BaseException:
                os._exit(1)
            os._exit(0)
        writers.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in writers] == [0] * 6
    assert [one.name for one in tmp_path.iterdir()] == [path.name]

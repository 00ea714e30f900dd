"""Files that come with the package, and files that several processes write."""

import os
from pathlib import Path

import pytest

from scratch_det.files import ROOT, find_file, write_atomically


def test_files_of_the_package_are_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "configs/Digits/quickstart.yaml"
    assert find_file(name) == find_file(tmp_path / name) == ROOT / name
    elsewhere = tmp_path.parent / name  # is not below the current folder
    assert find_file(elsewhere) == elsewhere
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert find_file(tmp_path / name) == tmp_path / name


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

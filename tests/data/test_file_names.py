"""Image files that a json spells in another way than the disk does."""

from pathlib import Path

import pytest

from scratch_det.data.file_names import is_outside, other_spellings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("0001.jpg", "sub/0002.JPG", "sub/deep/a b.png", "caf\u00e9.jpg", "cam1/7.jpg", "cam2/7.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    return tmp_path / "images"


class TestSpellings:
    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("images\\0001.jpg", "0001.jpg"),
            ("C:\\Users\\me\\images\\0001.JPG", "0001.jpg"),
            ("/home/me/images/0001.jpg", "0001.jpg"),
            ("./images//0001.jpg ", "0001.jpg"),
            ("../pictures/0001.jpg", "0001.jpg"),
            ("0002.jpg", "sub/0002.JPG"),
            ("a%20b.png", None),  # two folders more
            ("deep/a%20b.png", "sub/deep/a b.png"),
            ("cafe\u0301.jpg", "caf\u00e9.jpg"),
            ("7.jpg", None),  # of which camera?
            ("train/cam2/7.jpg", "cam2/7.jpg"),
            ("cam3/7.jpg", None),
            ("0003.jpg", None),
            ("", None),
        ],
    )
    def test_one_name(self, root, name, found):
        assert other_spellings(root, [name]) == ({name: found} if found else {})

    def test_names_that_are_right_need_nothing_and_keep_their_file(self, root):
        assert other_spellings(root, ["0001.jpg", "images/0001.jpg", "sub/0002.JPG"]) == {}

    def test_two_names_cannot_have_one_file(self, root):
        assert other_spellings(root, ["a/0001.jpg", "b/0001.jpg", "0002.jpg"]) == {"0002.jpg": "sub/0002.JPG"}

    def test_the_nearest_of_several(self, root):
        (root / "sub/0001.jpg").touch()
        assert other_spellings(root, ["0001.JPG"]) == {"0001.JPG": "0001.jpg"}

    def test_folders_in_a_circle(self, root):
        (root / "again").symlink_to(root)
        assert other_spellings(root, ["b/a b.png", "CAFE\u0301.jpg"]) == {"CAFE\u0301.jpg": "caf\u00e9.jpg"}


def test_outside(root: Path) -> None:
    inside = ["a.jpg", "sub/../a.jpg", "..a.jpg", f"{root}/a.jpg", "a../b.jpg"]
    outside = ["../a.jpg", "sub/../../a.jpg", "/etc/a.jpg", f"{root}2/a.jpg", f"{root}/../a.jpg"]
    assert [name for name in inside + outside if is_outside(root, name)] == outside

"""The digits demo set: same bytes for the same seed, no leak from train to val, annotations that fit what was drawn."""

import json
import runpy
import signal
import subprocess
import sys
import time
from itertools import chain, pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from scratch_det.data.digits import build, make_digits
from scratch_det.data.digits_scene import (
    MAX_DIGITS,
    MIN_VISIBLE,
    PHOTOGRAPHS,
    SCENES,
    annotation_entries,
    compose,
    extreme_pixels,
    fill_holes,
    load_material,
    photograph_names,
)
from scratch_det.errors import UserError

REPOSITORY = Path(__file__).parents[2]
TRAIN, VAL = 8, 4


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A tiny set of seed 3; digits_pretrain lies beside it."""
    out = tmp_path_factory.mktemp("root") / "digits"
    make_digits(out, 3, TRAIN, VAL)
    return out


@pytest.fixture(scope="module")
def scenes():
    """Forty val scenes as drawn, with the annotations they get."""
    drawn = [compose(0, "val", index) for index in range(40)]
    return [(scene, annotation_entries(scene, 1)) for scene in drawn]


def read(out: Path, split: str) -> dict:
    return json.loads((out / "annotations" / f"instances_{split}.json").read_text())


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder with its bytes and time of change."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


def pixels(annotation: dict, shape: tuple[int, int]) -> np.ndarray:
    """The mask that pycocotools makes of an annotation's polygons."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], *shape))).astype(bool)


def start_tool(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "tools/prepare_digits.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )


@pytest.fixture
def tool(monkeypatch, capsys):
    """``tool("--out", path, ...)`` runs scratch-det data digits in this process: exit code, lines printed, errors."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["prepare_digits.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(REPOSITORY / "tools" / "prepare_digits.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def test_same_seed_same_bytes(digits, tmp_path):
    make_digits(tmp_path / "digits", 3, TRAIN, VAL)
    for name in ("digits", "digits_pretrain"):
        first, second = snapshot(digits.parent / name), snapshot(tmp_path / name)
        assert {k: v[0] for k, v in first.items()} == {k: v[0] for k, v in second.items()}


def test_another_seed_differs_and_a_longer_set_starts_the_same(digits, tmp_path):
    make_digits(tmp_path / "other", 4, 1, 1)
    make_digits(tmp_path / "short", 3, 2, 1)
    first = (digits / "train" / "0000001.jpg").read_bytes()
    assert (tmp_path / "other" / "train" / "0000001.jpg").read_bytes() != first
    assert (tmp_path / "short" / "train" / "0000001.jpg").read_bytes() == first
    assert read(tmp_path / "short", "train")["images"] == read(digits, "train")["images"][:2]


def test_splits_share_nothing(digits):
    """Neither digits nor photographs; only search shows those of the pre-training set."""
    found = {split: read(digits, split) for split in SCENES}
    assert all(data["info"]["scans"] == found["train"]["info"]["scans"] for data in found.values())
    for side, data in found.items():
        assert {image["photograph"] for image in data["images"]} <= set(data["info"]["photographs"][side])
        assert {annotation["scan"] for annotation in data["annotations"]} <= set(data["info"]["scans"][side])
    scans = {split: {*chain(*indices)} for split, indices in load_material().shares.items()}
    assert sum(map(len, scans.values())) == len(set.union(*scans.values())) == 1797
    photographs = [photograph_names(split) for split in ("train", "val", "pretrain_train")]
    assert sorted(chain(*photographs)) == sorted(PHOTOGRAPHS)
    assert photograph_names("search") == photograph_names("pretrain_val") == photographs[-1]


def test_single_digits(digits):
    folder = digits.with_name("digits_pretrain")
    for split, count in (("train", 20), ("val", 16)):
        images = list((folder / split).glob("*/*.jpg"))
        assert len(images) == count
        assert {path.parent.name for path in images} == set("0123456789")
        assert cv2.imread(str(images[0])).shape == (64, 64, 3)


def test_json_is_coco(digits, capsys):
    for split, count in (("train", TRAIN), ("val", VAL)):
        coco = COCO(str(digits / "annotations" / f"instances_{split}.json"))
        assert len(coco.imgs) == count
        assert [(c["id"], c["name"]) for c in coco.dataset["categories"]] == [(i + 1, str(i)) for i in range(10)]
        for image in coco.imgs.values():
            assert cv2.imread(str(digits / split / image["file_name"])).shape == (image["height"], image["width"], 3)
            annotations = coco.imgToAnns[image["id"]]
            assert 1 <= len(annotations) <= MAX_DIGITS
            assert all(coco.annToMask(a).any() and a["num_keypoints"] == 4 for a in annotations)
    shapes = {(i["width"], i["height"]) for i in read(digits, "train")["images"]}
    assert shapes == {(160, 128), (128, 160)}


def test_polygons_reproduce_the_drawn_masks(scenes):
    overlaps = []
    for scene, annotations in scenes:
        for digit, annotation in zip(scene.digits, annotations, strict=True):
            again = pixels(annotation, scene.image.shape[:2])
            overlaps.append((again & digit.visible).sum() / (again | digit.visible).sum())
            assert annotation["area"] == digit.visible.sum()
            assert all(len(polygon) >= 6 for polygon in annotation["segmentation"])
    assert np.mean(overlaps) > 0.97
    assert min(overlaps) > 0.85


def test_boxes_are_tight(scenes):
    for scene, annotations in scenes:
        for digit, annotation in zip(scene.digits, annotations, strict=True):
            x, y, width, height = annotation["bbox"]
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]])
            assert [x, y] == points.min(axis=0).tolist()
            assert [x + width, y + height] == points.max(axis=0).tolist()
            assert np.abs(np.array(annotation["bbox"]) - cv2.boundingRect(digit.visible.astype(np.uint8))).max() <= 1


def test_keypoints_are_the_extremes_and_know_what_covers_them(scenes):
    seen = []
    for scene, annotations in scenes:
        for order, annotation in enumerate(annotations):
            points = np.reshape(annotation["keypoints"], (4, 3))
            silhouette = scene.digits[order].silhouette
            ys, xs = np.nonzero(silhouette)
            assert silhouette[points[:, 1], points[:, 0]].all()
            assert [points[0, 1], points[1, 1], points[2, 0], points[3, 0]] == [ys.min(), ys.max(), xs.min(), xs.max()]
            for x, y, v in points:
                assert v == (1 if any(later.silhouette[y, x] for later in scene.digits[order + 1 :]) else 2)
            seen += points[:, 2].tolist()
    assert set(seen) == {1, 2}


def test_every_digit_stays_recognisable(scenes):
    counts = [len(scene.digits) for scene, _ in scenes]
    assert set(counts) == set(range(1, MAX_DIGITS + 1))
    digits = [digit for scene, _ in scenes for digit in scene.digits]
    assert any(digit.visible.sum() < digit.silhouette.sum() for digit in digits), "nothing is ever occluded"
    for digit in digits:
        assert digit.visible.sum() >= MIN_VISIBLE * digit.silhouette.sum()
        assert (fill_holes(digit.visible) == digit.visible).all()
    for scene, _ in scenes:
        assert all((a.visible & b.silhouette).sum() == 0 for a, b in pairwise(scene.digits))


def test_extreme_pixels_of_a_known_shape():
    mask = np.zeros((10, 12), bool)
    mask[2:7, 3:8] = True
    assert extreme_pixels(mask) == [(5, 2), (5, 6), (3, 4), (7, 4)]


def test_rerun_leaves_a_finished_set_alone(digits):
    (digits / "annotations" / "of_a_user.json").write_text("{}")
    before = snapshot(digits)
    assert not any(make_digits(digits, 3, TRAIN, VAL).values())
    assert snapshot(digits) == before
    (digits / "annotations" / "of_a_user.json").unlink()


def test_other_parameters_and_altered_files_need_force(tmp_path):
    out = tmp_path / "digits"
    make_digits(out, 3, 2, 1)
    with pytest.raises(UserError, match=r"seed 3, not 5.*--force"):
        make_digits(out, 5, 2, 1)
    (out / "val" / "1000001.jpg").unlink()
    with pytest.raises(UserError, match=r"missing, altered or added files.*--force"):
        make_digits(out, 3, 2, 1)
    assert all(make_digits(out, 5, 2, 1, force=True).values())
    assert json.loads((out / "manifest.json").read_text())["parameters"]["seed"] == 5
    assert not any(make_digits(out, 5, 2, 1).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "digits_pretrain"]


def test_force_replaces_a_set_of_an_older_version(tmp_path):
    out = tmp_path / "digits"
    out.mkdir()
    (out / "manifest.json").write_text('{"generator": "scratch_det digits", "parameters": {"version": "0.1"}}')
    (out / "SHA256SUMS").write_text("")
    with pytest.raises(UserError, match=r"version 0\.1, not 2\.0.*--force"):
        make_digits(out, 3, 1, 1)
    assert all(make_digits(out, 3, 1, 1, force=True).values())
    assert sorted(path.name for path in out.iterdir()) == [
        "annotations",
        "manifest.json",
        "preview.png",
        "search",
        "train",
        "val",
    ]


@pytest.mark.parametrize("file", ["annotations/instances_val.json", "preview.png", "train/0000001.jpg"])
def test_manifest_covers_every_generated_file(digits, file):
    original = (digits / file).read_bytes()
    (digits / file).write_bytes(original[:-1])
    with pytest.raises(UserError, match="altered"):
        make_digits(digits, 3, TRAIN, VAL)
    (digits / file).write_bytes(original)
    assert not any(make_digits(digits, 3, TRAIN, VAL).values())


def test_foreign_folder_is_rejected_and_untouched(tmp_path):
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"precious")
    for manifest in (None, "{}", "[]", '{"generator": "another"}'):
        if manifest:
            (out / "manifest.json").write_text(manifest)
        before = snapshot(tmp_path)
        for force in (False, True):
            with pytest.raises(UserError, match=f"{out}.*choose another --out"):
                make_digits(out, 0, 1, 1, force)
        assert snapshot(tmp_path) == before


def test_foreign_pretraining_folder_is_rejected_before_any_work(tmp_path, tool):
    (tmp_path / "digits_pretrain").mkdir()
    (tmp_path / "digits_pretrain" / "mine").write_text("")
    code, _, err = tool("--out", tmp_path / "digits", "--force")
    assert (code, err.count("\n")) == (2, 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["digits_pretrain", "mine"]


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make_digits(tmp_path / "file" / "digits", 0, 1, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interruption_leaves_the_old_set_whole_and_no_half_one(tmp_path, error):
    out = tmp_path / "digits"
    make_digits(out, 3, 1, 1)
    before = snapshot(out)

    def interrupted(folder: Path, parameters: dict) -> None:
        (folder / "half.jpg").write_bytes(b"half")
        raise error

    for folder in (out, tmp_path / "new"):
        with pytest.raises(error):
            build(folder, {}, interrupted)
    assert snapshot(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "digits_pretrain"]


@pytest.mark.parametrize(
    ("train", "val", "seed", "word"), [(0, 1, 0, "--train"), (1, 0, 0, "--val"), (1, 1, -1, "--seed")]
)
def test_impossible_numbers_are_rejected(tmp_path, train, val, seed, word):
    with pytest.raises(UserError, match=word):
        make_digits(tmp_path / "digits", seed, train, val)


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGINT, 130, "interrupted: nothing half-made is left\n"), (signal.SIGTERM, 143, "")],
)
def test_signals_leave_nothing_behind(tmp_path, sent, code, said):
    process = start_tool("--out", tmp_path / "digits", "--train", 100_000)
    while not list(tmp_path.rglob("0000001.jpg")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.communicate() == ("", said)
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_tool_says_what_it_made_in_plain_lines(tmp_path, tool):
    out = tmp_path / "digits"
    for said in ("made", "already there, nothing to do"):
        lines = [f"{out}: {said}", f"{out}_pretrain: {said}", f"to see annotated scenes, open {out}/preview.png"]
        assert tool("--out", out, "--train", 2, "--val", 1) == (0, lines, "")


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv = ['x', '--help']; import runpy, atexit;"
    code += "atexit.register(lambda: print([m for m in ('sklearn', 'cv2', 'numpy', 'torch') if m in sys.modules]));"
    code += "runpy.run_path('tools/prepare_digits.py', run_name='__main__')"
    probe = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert "--force" in probe.stdout
    assert probe.stdout.rstrip().endswith("[]"), probe.stdout + probe.stderr

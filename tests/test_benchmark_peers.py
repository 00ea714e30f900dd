"""scratch-det benchmark beside detectron2, with a script of our own in the place of its plain training script."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import load_command

from scratch_det.benchmark.data import NAME, write_coco
from scratch_det.benchmark.loops import loop_against_plain_script, plan_training
from scratch_det.benchmark.measure import Rounds
from scratch_det.config.load import load_config
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import read_coco
from scratch_det.data.dataset import TrainingSet
from scratch_det.errors import UserError

pytestmark = pytest.mark.detectron2

BITMASKS = ["INPUT.MASK_FORMAT", "bitmask"]  # the toy data set has masks that are no polygons
PLAIN = """
from detectron2.data import build_detection_train_loader
def do_train(cfg, model):
    model.train()
    for batch in build_detection_train_loader(cfg):
        with open({seen!r}, "a") as out:
            out.write(" ".join(str(one["image_id"]) for one in batch) + "\\n")
"""


@pytest.fixture
def plain_script(tmp_path: Path) -> Iterator[Path]:
    """A script that writes the image ids of its batches into ``tmp_path / "seen"``; forgets the data sets after it."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    path, before = tmp_path / "plain.py", set(DatasetCatalog.list())
    path.write_text(PLAIN.format(seen=str(tmp_path / "seen")))
    yield path
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def test_both_train_the_same_images(toy_recipe: Path, plain_script: Path, tmp_path: Path) -> None:
    plan = plan_training(str(toy_recipe), BITMASKS, "detectron2")
    ours, theirs = loop_against_plain_script(plan, Rounds(4, warmup=3), plain_script)
    assert len(ours) == len(theirs) == 4
    cfg = load_config(toy_recipe).cfg
    dataset = TrainingSet(cfg, [read_coco(lookup("toy_train"), need_masks=True)])
    expected = [" ".join(str(dataset.image_id(2 * i + k)) for k in range(2)) for i in range(5)] * 2
    assert (tmp_path / "seen").read_text().splitlines() == expected


def test_no_script(toy_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"detectron2's script \S+nothing\.py is missing.*--script"):
        loop_against_plain_script(plan_training(str(toy_recipe), [], "detectron2"), Rounds(4), tmp_path / "nothing.py")


@pytest.fixture
def cells(
    toy_recipe: Path, plain_script: Path, datasets_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[list[str]]]:
    """What the table has after scratch-det benchmark measured rows on made-up images, by line and column."""
    write_coco(datasets_root, 12)

    def run(rows: str) -> list[list[str]]:
        sizes = ("--pairs", 1, "--repeats", 1, "--scale", 1e-4)
        words = [*sizes, "--script", plain_script, "--out", tmp_path / "table.md"]
        recipe = ["--config-file", toy_recipe, "DATASETS.TRAIN", f"('{NAME}',)"]
        monkeypatch.setattr("sys.argv", ["benchmark.py", rows, *map(str, (*words, *recipe))])
        load_command("benchmark").main()
        lines = (tmp_path / "table.md").read_text().splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]

    return run


def test_rows_beside_detectron2(cells: Callable[[str], list[list[str]]]) -> None:
    found = cells("sample,loader,step")
    assert [(what.split(",")[0], unit, beside) for what, unit, beside, *_ in found] == [
        *(
            ("sample", f"{clock} ms", f"detectron2, {form}")
            for form in ("polygon", "bitmask")
            for clock in ("wall", "CPU")
        ),
        *(("loader", "images/s", f"detectron2, {form}") for form in ("polygon", "bitmask")),
        *(("model step", f"{clock} ms", "detectron2, float32") for _ in range(2) for clock in ("wall", "CPU")),
        *(("iteration", f"{clock} ms", "detectron2, plain script") for clock in ("wall", "CPU")),
    ]
    assert all(float(number.replace(",", "")) > 0 for line in found for number in line[3:6])


@pytest.mark.slow
def test_starts_beside_detectron2(cells: Callable[[str], list[list[str]]]) -> None:
    found = {(what.split(",")[0], unit): numbers for what, unit, _, *numbers, _ in cells("start,startup")}
    compared = [*((f"{which} start", "private MB") for which in ("first", "later")),
                ("start to the first iteration's end", "CPU s")]  # fmt: skip
    assert all(float(number.replace(",", "")) > 0 for key in compared for number in found[key])

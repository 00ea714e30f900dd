"""The experiment list: complete for what there is, true to the recipes and to the paper's arithmetic."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_tool

from scratch_det.config import check_config, load_config
from scratch_det.schedule import Schedule, kx_schedule
from scratch_det.study import paper
from scratch_det.study.experiments import Experiment, experiments, find, of_place
from scratch_det.study.samples import of_pretraining, of_run

ALL = experiments()
KX = [run for run in ALL if run.k]
PAPER_RECIPES = [path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in ("_base_", "Digits")]
DATA = {"train_aug": "coco_2017_train_aug", "35k": "coco_2017_35k_512_800", "old": "coco_2017_35k"}  # a name's end


def bases(run: Experiment) -> dict[str, str]:
    """The four files a recipe is made of, by kind."""
    found = [Path(base).parts[-2:] for base in yaml.safe_load((ROOT / run.config).read_text())["_BASE_"]]
    return {kind: name.removesuffix(".yaml") for kind, name in found}


def test_every_recipe_of_the_paper_is_listed_once() -> None:
    assert sorted(run.config for run in ALL) == sorted(path.relative_to(ROOT) for path in PAPER_RECIPES)
    assert len({run.name for run in ALL}) == len(ALL)


@pytest.mark.parametrize("run", ALL, ids=lambda run: run.name)
def test_can_train(run: Experiment) -> None:
    cfg = load_config(ROOT / run.config).cfg
    assert check_config(cfg, 8) == []
    assert run.iterations == cfg.SOLVER.MAX_ITER
    assert bool(cfg.MODEL.WEIGHTS) == (run.init == paper.PRETRAINED)


@pytest.mark.parametrize("run", KX, ids=lambda run: run.name)
class TestRun:
    def test_has_the_schedule(self, run: Experiment) -> None:
        solver = load_config(ROOT / run.config).cfg.SOLVER
        assert Schedule(solver.MAX_ITER, tuple(solver.STEPS)) == kx_schedule(run.k)

    def test_agrees_with_its_name(self, run: Experiment) -> None:
        found, words = bases(run), run.name.split("_")
        depth = run.name.partition("_R_")[2].partition("_")[0]
        norm = "syncbn" if "syncbn" in words else "gn"
        end = (
            run.name.removeprefix(f"{run.init}_mask_rcnn_R_{depth}_FPN_{run.k}x_{norm}").strip("_").removeprefix("35k_")
        )
        weights = "bn" if norm == "syncbn" else norm
        assert found == {
            "model": f"mask_rcnn_R_{depth}_FPN_{norm}",
            "data": DATA.get(end, "coco_2017"),
            "init": "scratch" if run.init == paper.SCRATCH else f"imagenet_R_{depth}_{weights}",
            "solver": f"{run.k}x_35k" if end == "35k" else f"{run.k}x",
        }

    def test_trunk(self, run: Experiment) -> None:
        if run.trunk:
            trunk = find(run.trunk)
            assert {**bases(run), "solver": ""} == {**bases(trunk), "solver": ""}
            assert run.branch_at == run.iterations - 60_000 < trunk.iterations


@pytest.mark.parametrize("place", ["table1", "figure1", "figure3", "figure4"])
def test_two_recipes_of_a_place_differ_in_what_their_names_say(place: str) -> None:
    runs = of_place(place)
    for one in runs:
        for other in runs:
            differing = {kind for kind in bases(one) if bases(one)[kind] != bases(other)[kind]}
            depths = {run.name.partition("_R_")[2].partition("_")[0] for run in (one, other)}
            expected = {"solver"} if one.k != other.k else set()
            expected |= {"init"} if one.init != other.init else set()
            expected |= {"model"} if len(depths) > 1 else set()
            both_pretrained = one.init == other.init == paper.PRETRAINED
            expected |= {"init"} if len(depths) > 1 and both_pretrained else set()
            assert differing == expected, (one.name, other.name)


def test_table1_costs_43_percent() -> None:
    """Five schedules of four models: 780k iterations off one trunk instead of 1.8M, each."""
    runs = of_place("table1")
    assert len(runs) == 20
    assert sum(run.iterations for run in runs) == 7_200_000
    assert sum(run.iterations - run.branch_at for run in runs) == 3_120_000
    assert {run.expected["bbox/AP"] for run in runs} == {ap for row in paper.TABLE1.values() for ap in row.values()}
    assert find("scratch_mask_rcnn_R_50_FPN_3x_gn").branch_at == 210_000


def test_tables_agree() -> None:
    for row, values in paper.TABLE2.items():
        assert values[0] == pytest.approx(paper.TABLE1[row][6], abs=0.1 + 1e-9)
    assert len(of_place("table2")) == 4


class TestSamples:
    def test_figure_2(self, datasets_root: Path) -> None:
        """Fewer images and instances from scratch, and as many pixels; COCO itself is not needed."""
        (pretrained, _), (scratch, source) = (
            of_run(load_config(ROOT / find(f"{name}_gn").config).cfg)
            for name in ("pretrained_mask_rcnn_R_50_FPN_2x", "scratch_mask_rcnn_R_50_FPN_6x")
        )
        pretrained += of_pretraining()
        assert source.startswith("train2017's")
        assert (pretrained.images, scratch.images) == (128_116_700 + 2_880_000, 8_640_000)
        assert pretrained.instances == pytest.approx(149e6, rel=0.01)
        assert scratch.instances == pytest.approx(62.8e6, rel=0.01)
        assert pretrained.pixels == pytest.approx(9.5e12, rel=0.01)
        assert scratch.pixels == pytest.approx(9.2e12, rel=0.01)

    def test_a_data_set_at_hand_is_counted(self, toy_recipe: Path) -> None:
        cfg = load_config(toy_recipe).cfg
        seen, source = of_run(cfg)
        assert (seen.images, seen.instances) == (4, 4 * 6 / 4)  # four images, the last one without its two objects
        assert seen.pixels == 4 * 64 * 96
        assert source == "toy_train's"


class TestTool:
    def test_samples(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, toy_recipe: Path) -> None:
        monkeypatch.setattr("sys.argv", ["study.py", "samples", "--config-file", str(toy_recipe)])
        load_tool("study").main()
        assert "1.50, toy_train's" in capsys.readouterr().out

    def test_list(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        monkeypatch.setattr("sys.argv", ["study.py", "list", "--experiment", "table1"])
        load_tool("study").main()
        said = capsys.readouterr().out
        assert said.count("\n") == 23
        assert "| 7,200,000  | 3,120,000 " in said

    def test_unknown(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        monkeypatch.setattr("sys.argv", ["study.py", "list", "--experiment", "tabel1"])
        with pytest.raises(SystemExit) as end:
            load_tool("study").main()
        assert end.value.code == 2
        assert "no experiment of tabel1; did you mean 'table1'?" in capsys.readouterr().err

    def test_does_not_import_torch(self) -> None:
        code = (
            "import sys, runpy; sys.argv = ['study.py', 'list']; runpy.run_path('tools/study.py', run_name='__main__');"
        )
        code += "assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)

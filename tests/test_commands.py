"""The console command: its table, its scripts in tools/, and a wheel that has the recipes."""

import os
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scratch_det import __main__
from scratch_det.command_line import exit_on_user_error
from scratch_det.commands import COMMANDS, module_of
from scratch_det.config.load import flatten, get_cfg, load_config, plain


def said(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["scratch-det", *words])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out + err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = said(capsys, monkeypatch, *command.split(), "--help")
    assert code == 0
    assert text.startswith(f"usage: scratch-det {command} ")
    assert f"    scratch-det {command}" in text  # an example
    module = import_module(module_of(command))
    assert module.build_parser().description == module.__doc__ or "%s" in module.__doc__


def test_scripts_and_commands_are_the_same() -> None:
    """tools/ has a script for each command that needs a clone's users; none does anything of its own."""
    modules = {path.stem for path in (ROOT / "scratch_det/commands").glob("*.py")} - {"__init__"}
    assert modules == {name.replace(" ", "_") for name in COMMANDS}
    for script in {*(ROOT / "tools").glob("*.py")} - {ROOT / "tools/render_docs.py"}:
        lines = script.read_text().splitlines()
        command = lines[1].split("``")[1].removeprefix("scratch-det ")
        assert lines[3] == f"from {module_of(command)} import main", script
        assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ((), 2, "  train           train a detector"),
        (("--help",), 0, "  data fix        write a repaired copy"),
        (("--version",), 0, "scratch_det 0.1.0"),
        (("trian",), 2, "error: 'trian' is not a command; did you mean 'train'?"),
        (("detect",), 2, "error: 'detect' is not a command; did you mean 'predict'?"),
        (("val",), 2, "error: 'val' is not a command; did you mean 'eval'?"),
        (("predict", "run", "a.jpg", "--conf", "0.5"), 2, "instead of --conf write --score S"),
        (("predict", "run", "--source", "a.jpg"), 2, "instead of --source write SOURCE without a flag"),
        (("predict", "a.JPG", "run"), 2, "error: a.JPG is an image or a video; MODEL comes first: scratch-det predict"),
        (("view",), 2, "commands:\n  view data "),
        (("view", "--help"), 0, "commands:\n  view data "),
        (("view", "curve"), 2, "error: 'view curve' is not a command; did you mean 'view curves'?"),
    ],
)
def test_words_that_are_no_command(
    words: tuple[str, ...], code: int, text: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, output = said(capsys, monkeypatch, *words)
    assert got == code
    assert text in output


def test_config_prints_what_is_merged(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys as a recipe that is the same again, and what differs as words of a command line that are."""
    recipe, changes = str(ROOT / "configs/Digits/quickstart.yaml"), ["SOLVER.STEPS", "(4, 5)", "MODEL.WEIGHTS", "a b"]
    expected = load_config(recipe, changes).cfg
    for flags in ((), ("--diff",)):
        monkeypatch.setattr(
            sys, "argv", ["scratch-det", "config", recipe, *flags, *changes, "--backend", "torchvision"]
        )
        __main__.main()
        said = capsys.readouterr().out
        found = get_cfg()
        found.merge_from_other_cfg(found.load_cfg(said)) if not flags else found.merge_from_list(shlex.split(said))
        assert plain([*flatten(found).items()]) == plain([*flatten(expected).items()])
    assert "SOLVER.MOMENTUM" not in said  # as by default


def test_completion_knows_commands_and_flags(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shtab")
    monkeypatch.setattr(sys, "argv", ["scratch-det", "completion", "bash"])
    __main__.main()
    script = capsys.readouterr().out
    files = ("_predict_pos_0", "_study_run___out", "_benchmark___config_file")
    ends = [f"_shtab_scratch_det{name}_COMPGEN=_shtab_compgen_files" for name in files]
    for words in ("analyze", "errors", "--scale-to-batch", "--max-parallel", *ends):
        assert words in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_constraints_have_what_was_tested() -> None:
    """One version of each library that pyproject.toml names, one that it takes; detectron2 is no release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras.keys() - {"detectron2"} for line in extras[name])]
    wanted = {canonicalize_name(one.name): one.specifier for one in map(Requirement, lines)}
    assert wanted.pop("scratch-det") == ""  # of dev: other extras
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    found = dict(line.split("==") for line in pins)
    assert wanted.keys() == {canonicalize_name(name) for name in found}
    for name, version in found.items():
        assert version in wanted[canonicalize_name(name)], name


def test_a_missing_library_names_its_extra(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"), exit_on_user_error():
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")
    assert "not installed: pip install 'scratch_det[demo]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves build/ behind."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("needs git, to tell the sources from other files")
    for name in files.stdout.splitlines():
        if not name.startswith(("tests/", "results/digits")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--wheel-dir", folder, folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_has_the_recipes(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    shipped = (
        "scratch_det",
        "configs",
        "studies",
        "projects",
        "docs/slurm.sh",
        "docs/grid_*.yaml",
        "results/models.csv",
    )
    files = subprocess.run(["git", "ls-files", *shipped], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    wanted = {f"scratch_det/{name.removeprefix('scratch_det/')}" for name in files if "/tests/" not in name}
    assert len(wanted) > 200
    assert wanted <= names
    assert not {name for name in names if "/tests/" in name}


@pytest.mark.slow
def test_commands_of_a_wheel_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    """Recipes, studies and projects by the names that the documents use; a study's jobs too."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(install, check=True)
    work = tmp_path / "work"
    work.mkdir()

    def run(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
        environment.pop("DETECTRON2_DATASETS", None)
        command = [sys.executable, "-m", "scratch_det", *words]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    run("data", "digits", "--train", "12", "--val", "4")
    recipe = ("--config-file", "configs/Digits/quickstart.yaml", "--backend", "torchvision")
    assert "ready to train" in run("check", *recipe)
    run("train", *recipe, "--trial", "3")
    assert (work / "output/quickstart_trial/result.json").exists()
    assert "parameters" in run("analyze", "model", "--project", "projects/lsj", *recipe)
    assert "216" in run("study", "plan", "inits", "--seconds-per-iter", "0.3")
    ids = "120=datasets/digits/annotations/instances_train.json"
    run("data", "subsets", "--dataset", "digits_train", "--sizes", "", "--ids", ids)
    jobs = run("study", "run", "digits/smoke", "--out", "smoke", "--backend", "torchvision", "--dry-run").splitlines()
    words = shlex.split(jobs[0])
    assert "ready to train" in run("check", *words[words.index("train") + 1 :])

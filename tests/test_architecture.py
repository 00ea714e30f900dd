"""Who may import whom: layers of the package, no circles, and no torch before a request has passed its checks."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

import scratch_det
from scratch_det.backends import BACKENDS
from scratch_det.commands import COMMANDS

PACKAGE = Path(str(scratch_det.__file__)).parent

# A module imports from the layers above its own in this table, and from its own package; see docs/architecture.md.
LAYERS = (
    ("errors",),
    ("files", "tables"),
    ("log",),
    ("reading", "command_line"),
    ("config", "distributed"),  # recipes and their rules; processes
    ("data", "modeling", "weights"),
    ("backends", "evaluation"),  # the two detectors; metrics
    ("visualization",),
    ("engine",),  # plan, train, resume
    ("detector", "sources"),  # a trained model and its input
    (
        "analysis",
        "benchmark",
        "conversion",
        "diagnosis",
        "export",
        "predict",
        "study",
    ),  # what looks at runs, or starts them
    ("commands",),
    ("__main__",),
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}

WITHOUT_TORCH = (
    "config", "command_line", "distributed.launch", "distributed.stop", "data.catalog", "data.coco",
    "data.voc", "backends", "backends.keys", "weights.locate", "engine.run_dir",
    "engine.datasets", "engine.plan", "engine.check", "engine.command", "engine.changes",
    "study.commands", "study.search", "study.report", "study.report.page", "diagnosis.command",
)  # fmt: skip


def module_name(path: Path) -> str:
    """scratch_det.engine.plan for its file, scratch_det.config for that package's __init__.py."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, at_import: bool = False) -> Iterator[str]:
    """Every module that ``path`` imports; ``from a import b`` counts as a and a.b.

    at_import: only those that are imported with it, none inside functions or for type checkers alone.
    """
    nodes = [ast.parse(path.read_text())]
    for node in nodes:  # grows while it is walked
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{name.name}" for name in node.names)
        lazy = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        nodes += [] if at_import and lazy else ast.iter_child_nodes(node)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_there_are_no_circles() -> None:
    graph = {name: {one for one in imports(path, at_import=True) if one in MODULES and one != name}
             for name, path in MODULES.items()}  # fmt: skip
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_lower_layers_do_not_import_higher_ones() -> None:
    wrong = []
    for name, path in MODULES.items():
        for other in {one for one in imports(path) if one in MODULES}:
            importer, imported = (one.split(".")[1] if "." in one else "" for one in (name, other))
            if "" in (importer, imported) or imported == importer:  # the package itself names what users import
                continue
            assert {importer, imported} <= LAYER.keys(), f"{importer} or {imported} is new: give it a layer"
            if LAYER[imported] >= LAYER[importer]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_backends_do_not_import_each_other() -> None:
    for backend, other in (BACKENDS, BACKENDS[::-1]):
        paths = list((PACKAGE / "backends").glob(f"{backend}*.py"))
        assert paths
        for path in paths:
            assert not {name for name in imports(path) if name.startswith(f"scratch_det.backends.{other}")}, path


def test_the_package_knows_neither_projects_nor_tools() -> None:
    projects = {path.parent.name for path in (ROOT / "projects").glob("*/__init__.py")}
    assert projects
    for path in MODULES.values():
        found = {name.split(".")[0] for name in imports(path)}
        assert not found & {*projects, "projects", "timm", "tools", "tests", "conftest"}, path


def test_tools_import_nothing_but_the_package() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        found = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert found == {"scratch_det"}, path


def run(code: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_checks_do_not_import_torch() -> None:
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module('scratch_det.' + name)\n"
    run(code + "    assert 'torch' not in sys.modules, name + ' imports torch'\n", *WITHOUT_TORCH)


def test_help_imports_nothing_that_takes_long() -> None:
    """It comes within 0.3 s, of which Python itself takes 0.06 s."""
    code = (
        "import contextlib, os, sys\n"
        "from scratch_det.__main__ import main\n"
        "for command in sys.argv[1:]:\n"
        "    sys.argv = ['scratch-det', *command.split(), '--help']\n"
        "    with contextlib.redirect_stdout(open(os.devnull, 'w')), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    slow = {'torch', 'matplotlib', 'numpy', 'scipy', 'PIL', 'jinja2', 'rich'} & sys.modules.keys()\n"
        "    assert not slow, (command, slow)\n"
    )
    run(code, *COMMANDS)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("train_net", ("MODEL.BACKBONE.FREEZE_AT", "2")),
        ("pretrain_net", ("MODEL.RESNETS.DEPTH", "51")),
        ("check", ("SOLVER.BASE_LRR", "1")),
        ("analyze_model", ("MODEL.RESNETS.DEPTH", "51")),
    ],
)
def test_errors_of_the_user_come_without_torch(tool: str, arguments: tuple[str, ...]) -> None:
    code = (
        "import runpy, sys\nsys.argv.pop(0)\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print('exit', end.code, 'torch' in sys.modules)\n"
    )
    config = ("--config-file", ROOT / "configs/Digits/quickstart.yaml", "--backend", "torchvision")
    assert run(code, ROOT / "tools" / f"{tool}.py", *config, *arguments).splitlines()[-1] == "exit 2 False"


def test_a_start_imports_what_it_needs(toy_recipe: Path, tmp_path: Path) -> None:
    """Neither iteration 1 nor the answer on a finished run waits for libraries that it does not use."""
    code = "import runpy, sys\nsys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\nprint(*sys.modules)\n"
    command = (code, ROOT / "tools/train_net.py", "--config-file", toy_recipe, "--backend", "torchvision")
    loaded = {*run(*command, "--stop-at", "1").splitlines()[-1].split()}
    assert "torchvision" in loaded
    assert not loaded & {"matplotlib", "tensorboard"}
    (tmp_path / "run/result.json").write_text('{"iteration": 2, "metrics": {}}')
    for processes in ("1", "2"):
        *said, modules = run(*command, "--resume", "--num-gpus", processes).splitlines()
        assert said[-1].endswith("holds a finished run of 2 iterations; nothing to do")
        assert "torch" not in modules.split()

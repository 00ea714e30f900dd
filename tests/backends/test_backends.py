"""Choosing a backend, and the keys of detectron2's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from scratch_det import backends
from scratch_det.config.load import flatten, get_cfg, load_config, with_project_keys
from scratch_det.errors import ConfigError, UserError

SMALL = ROOT / "configs/Digits/quickstart.yaml"
LEAVES = sorted(
    path
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name not in ("_base_", "Digits", "Pretraining", "Torchvision")
)
KEYS = f"from .config import CfgNode\n_C = CfgNode.load_cfg({get_cfg().dump()!r})\n"
BROKEN = {  # files of a package called detectron2
    "an error in it": {"__init__.py": "raise ImportError('libcudart.so.99: cannot open')", "config/defaults.py": KEYS},
    "no compiled part": {"__init__.py": "", "config/defaults.py": KEYS},
    "another package": {"__init__.py": ""},
    "too old": {"__init__.py": "", "config/defaults.py": KEYS + "del _C.FLOAT32_PRECISION\n"},
}


class TestChoice:
    @pytest.mark.parametrize(("installed", "expected"), [(True, "detectron2"), (False, "torchvision")])
    def test_auto(self, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "is_installed", lambda name: installed or name == "torchvision")
        assert backends.choose("auto") == expected
        assert backends.choose("torchvision") == "torchvision"

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "is_installed", lambda name: False)
        with pytest.raises(UserError) as rejection:
            backends.choose("detectron2")
        for words in ("not installed", backends.INSTALL_PAGE, backends.TESTED, "--backend torchvision"):
            assert words in str(rejection.value)

    @pytest.mark.parametrize("fault", BROKEN)
    def test_there_but_broken(self, fault: str, toy_recipe: Path, tmp_path: Path) -> None:
        """What failed is said once, and nothing is written."""
        for name, content in BROKEN[fault].items():
            file = tmp_path / "path/detectron2" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        command = [sys.executable, ROOT / "tools/train_net.py", "--config-file", toy_recipe, "--backend", "detectron2"]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error:") == 1
        assert "is installed, but does not work (" in done.stderr
        assert "--backend torchvision" in done.stderr
        assert not (tmp_path / "run").exists()

    def test_a_key_that_only_detectron2_has(self) -> None:
        with pytest.raises(ConfigError, match=r"MODEL\.RETINANET\.NUM_CONVS .*that is not trained here"):
            load_config(SMALL, ["MODEL.RETINANET.NUM_CONVS", 2])


@pytest.mark.detectron2
class TestKeys:
    def test_defaults_are_detectron2s_own_and_need_no_torch(self) -> None:
        code = "import sys; from scratch_det import backends; print(backends.defaults('detectron2').dump());"
        code += "assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        from detectron2.config import get_cfg as stock_cfg

        assert done.stdout.strip() == with_project_keys(stock_cfg()).dump().strip()

    def test_every_key_of_detectron2_works(self) -> None:
        defaults = backends.defaults("detectron2")
        assert load_config(SMALL, ["MODEL.RETINANET.NUM_CONVS", 2], defaults).cfg.MODEL.RETINANET.NUM_CONVS == 2
        assert flatten(get_cfg()).keys() < flatten(defaults).keys()

    def test_what_the_loop_does_not_have_is_rejected(self) -> None:
        cfg = load_config(SMALL, ["INPUT.CROP.ENABLED", True, "MODEL.META_ARCHITECTURE", "PanopticFPN"]).cfg
        with pytest.raises(ConfigError, match=r"the detectron2 backend does not support(?s:.)*PanopticFPN(?s:.)*CROP"):
            backends.check_keys("detectron2", cfg)
        for leaf in (SMALL, *LEAVES):
            backends.check_keys("detectron2", load_config(leaf).cfg)

"""The scripts of SLURM jobs: the templates, what is rejected in one, and what a script does, run with stub programs."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from study.player import PART
from study.stub_slurm import script

from scratch_det.errors import ConfigError, UserError
from scratch_det.study.slurm import Slurm
from scratch_det.study.study import Study


class TestTemplate:
    def test_default(self, study: Study) -> None:
        one = Slurm(study.out).script(replace(study.steps()[0], threads=3))
        lines = one.splitlines()
        assert lines[:4] == [
            "#!/bin/bash",
            "#SBATCH --nodes=1",
            "#SBATCH --ntasks-per-node=1",
            "#SBATCH --signal=USR1@120",
        ]
        assert "export OMP_NUM_THREADS=3" in lines
        (run,) = (line for line in lines if line.startswith("srun "))
        assert f"{sys.executable} -m scratch_det train --config-file " in run
        assert "--num-gpus" not in one  # a task a process
        assert f"> {study.out}/jobs/{PART}.exit" in one

    def test_gpus(self, study: Study) -> None:
        one = Slurm(study.out).script(replace(study.steps()[0], threads=3, processes=8, on_gpu=True))
        assert "#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in one
        assert "OMP_NUM_THREADS" not in one

    def test_the_example(self, study: Study) -> None:
        """16 processes on two nodes."""
        slurm = Slurm(study.out, ROOT / "docs/slurm.sh")
        one = slurm.script(replace(study.steps()[0], processes=16, on_gpu=True)).splitlines()
        assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "#SBATCH --gpus-per-node=8"} < set(one)
        assert {"#SBATCH --partition=gpu", "#SBATCH --time=1-00:00:00", "export NCCL_DEBUG=WARN"} < set(one)
        on_cpu = slurm.script(study.steps()[0])
        assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n" in on_cpu
        assert "--gpus-per-node" not in on_cpu
        for line in one:  # #SBATCH lines after the first command would not count
            if line and not line.startswith("#"):
                break
        assert not any(other.startswith("#SBATCH") for other in one[one.index(line) :])

    def test_no_words_of_several_lines(self, study: Study) -> None:
        """A second line of a name would end a #SBATCH or a comment, and be run."""
        step = study.steps()[0]
        with pytest.raises(UserError, match=r"its name has several lines, 'a\\nrm -rf x'; rename the folder"):
            Slurm(study.out).script(replace(step, name="a\nrm -rf x"))
        with pytest.raises(UserError, match="its command has several lines"):
            Slurm(study.out).script(replace(step, words=(*step.words, "OUTPUT_DIR", "a\nb")))

    def test_uneven_nodes(self, study: Study) -> None:
        slurm = Slurm(study.out, ROOT / "docs/slurm.sh")
        with pytest.raises(ConfigError, match=r"docs/slurm\.sh: 9 processes cannot be shared evenly by 2 nodes of 8"):
            slurm.script(replace(study.steps()[0], processes=9))

    @pytest.mark.parametrize("template", [None, ROOT / "docs/slurm.sh"])
    @pytest.mark.parametrize("code", [0, 1, 75])
    def test_what_the_script_does(self, programs: Path, study: Study, template: Path | None, code: int) -> None:
        """It hands on the exit code; 75 is requeued, and another failure's code is left in jobs/NAME.exit."""
        script(programs, "srun", f'echo "$@" > {programs}/srun_words; exit {code}')
        script(programs, "scontrol", f'echo "$@" > {programs}/scontrol_words')
        path, left = programs / "job.sh", study.out / f"jobs/{PART}.exit"
        left.write_text("3\n")  # of an earlier start
        path.write_text(Slurm(study.out, template).script(study.steps()[0]))
        done = subprocess.run(["bash", path], capture_output=True, text=True, env={**os.environ, "SLURM_JOB_ID": "17"})
        assert (done.returncode, done.stderr) == (code, "")
        assert done.stdout.startswith("--- started ")
        assert done.stdout.endswith(": job 17\n")
        assert "-m scratch_det train" in (programs / "srun_words").read_text()
        requeued = programs / "scontrol_words"
        assert (requeued.read_text() if requeued.exists() else "") == ("requeue 17\n" if code == 75 else "")
        assert (left.read_text() if left.exists() else "") == ("1\n" if code == 1 else "")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("partition: gpu\ntime: 1-00:00:00\n", "expected #! and {{ command }}, the run"),
            ("#!/bin/bash\nsrun {{ comand }}\n", "'comand' is undefined; placeholders are name, command, processes"),
            ("#!/bin/bash\nsrun {{ command }\n", "unexpected '}'"),
            (
                "#!/bin/bash\nsrun scratch-det train\n",
                "expected #! and {{ command }}, the run",
            ),
            (b"#!/bin/bash\n# \xe9\n", "invalid continuation byte"),
        ],
    )
    @pytest.mark.usefixtures("programs")
    def test_rejected(self, text: str | bytes, message: str, tmp_path: Path, study_tool: Callable) -> None:
        path, out = tmp_path / "mine", tmp_path / "study"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        code, said = study_tool("run", "digits/smoke", "--out", out, "--launcher", "slurm", "--slurm", path)
        assert (code, out.exists(), said.count("\n")) == (2, False, 1)
        assert message in said
        assert str(path) in said

"""What all tools share: the argument parser, the exit on user errors, and ``--project`` (see projects/README.md)."""

import errno
import os
import shlex
import sys
import tempfile
import traceback
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from scratch_det.errors import EXIT_CODE, EXIT_UNEXPECTED, UserError, did_you_mean, quoted, shortened
from scratch_det.files import Lenient, find_file

UNUSABLE = {  # what is wrong with a path, and the fix
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "move away what is there"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on its disk"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "look after its disk, which fails"),
    errno.ENOENT: "restore it",
    errno.EROFS: "make its disk writable",
    errno.ENAMETOOLONG: "shorten its name",
    errno.ELOOP: "fix its links, which form a circle",
}
EXTRAS = {  # modules of libraries that an installation may lack -> the extra of pyproject.toml that has them
    "sklearn": "demo", "skimage": "demo", "timm": "timm", "lightly": "self_supervised", "shtab": "completion",
    "onnx_ir": "export", "onnxscript": "export", "onnxruntime": "export",
}  # fmt: skip
UNREAD = "standard output was closed before the command had finished; start it again"
EXIT_INTERRUPTED, EXIT_UNREAD = 130, 141  # as a shell has it for SIGINT and SIGPIPE
SHOW_TRACEBACK = "SCRATCH_DET_TRACEBACK"  # an environment variable
TRACEBACK = "traceback.txt"
TRACEBACK_FOLDERS: list[Path] = []  # the last one first; else the current one
MOST_LETTERS = 300  # of an unexpected error


@contextmanager
def exit_on_user_error(
    prints: bool = True, reading_only: bool = False, is_run: bool = False, interrupted: str = "interrupted"
) -> Iterator[None]:
    """Turn every error into ``error: message`` on stderr and an exit code; no tool ends in a traceback.

    Code 2: an error that the user can mend, see ``explained``; 70: any other, see ``unexpected``; 130: Ctrl-C; 141: see
    reading_only.

    prints: False in the ranks that leave the user's errors to another one; only the exit code is set.
    reading_only: the block only prints what it found, so an output that is closed early, as by ``| head``, ends it
        without a message. Otherwise work may be unfinished.
    is_run: what counts are files, so the work goes on, with its exit code, when standard output fails in any way.
    interrupted: the message after Ctrl-C.
    """
    for name, may_fail in (("stdout", is_run), ("stderr", True)):  # until the process ends
        output = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 - None where a shell closed it: >&-
        setattr(sys, name, Lenient(output) if may_fail and not isinstance(output, Lenient) else output)
    try:
        yield
        sys.stdout.flush()  # now, not when Python ends: a reader that is gone is noticed only here
        return
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception as error:
        is_unread = isinstance(error, BrokenPipeError) and _is_output_closed()
        if is_unread and reading_only:
            raise SystemExit(EXIT_UNREAD) from None
        if message := UNREAD if is_unread else explained(error):
            if prints:
                print(f"error: {message}", file=sys.stderr)
            raise SystemExit(EXIT_CODE) from None
        print(f"error: {unexpected(error)}", file=sys.stderr)
        raise SystemExit(EXIT_UNEXPECTED) from None


def explained(error: BaseException) -> str | None:
    """The message of an error that the user can mend: a UserError, an unusable file, or no memory left."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)  # that of a stream has no name
    if isinstance(error, OSError) and error.errno in UNUSABLE and (error.filename or is_full):
        name = shortened(str(error.filename or "standard output, or a file"))
        return f"{name}: {error.strerror}; {UNUSABLE[error.errno]}, or name another"
    full = isinstance(error, MemoryError) or "can't allocate memory" in str(error)  # the latter is torch's, on the CPU
    if full or type(error).__name__ == "OutOfMemoryError":  # ... and on a GPU
        reason = (str(error).splitlines() or ["by Python"])[0]
        return f"no more memory ({reason}); make batches or images smaller, see --scale-to-batch, or end other programs"
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(str(error.name).partition(".")[0])):
        return f"this needs {error.name}, which is not installed: pip install 'scratch_det[{extra}]'"
    return str(error) if isinstance(error, UserError) else None


def unexpected(error: BaseException) -> str:
    """Where an error of any other kind arose, at which file, and what it says; its traceback is written into a file.

    The file is found among the variables of our functions, the innermost first.
    """
    text = "".join(traceback.format_exception(error))
    if os.environ.get(SHOW_TRACEBACK):
        print(text, file=sys.stderr)
    package = str(Path(__file__).parent)
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
              if frame.f_code.co_filename.startswith(package) and frame.f_code.co_filename != __file__]  # fmt: skip
    variables = [value for frame, _ in reversed(frames) for value in frame.f_locals.values()]
    files = [str(value) for value in variables if isinstance(value, Path) and os.path.isfile(value)]
    at = f" at {files[0]}" if files else ""
    if frames:
        code, line = frames[-1][0].f_code, frames[-1][1]
        at = f" in {code.co_qualname} (scratch_det{code.co_filename.removeprefix(package)}:{line}){at}"
    where = ""
    for folder in (*reversed(TRACEBACK_FOLDERS), Path(), Path(tempfile.gettempdir())):
        with suppress(OSError):
            path = (folder / TRACEBACK).absolute()
            path.write_text(f"{shlex.join(sys.orig_argv)}\n{text}", errors="replace")
            where = f"the traceback is in {path}, and "
            break
    *_, last = said = str(error).strip().splitlines() or [""]  # that of a data worker holds its traceback
    what = f"{type(error).__name__}: {last if 'Traceback' in str(error) else ' '.join(said)}"[:MOST_LETTERS]
    return f"unexpected error{at}: {what}\n  this is a bug, or a file is damaged; {where}{SHOW_TRACEBACK}=1 shows it"


def _is_output_closed() -> bool:
    """Whether nobody reads standard output; any other pipe that broke is an error of ours."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return True
    return False


RESUME = (
    "--resume takes no value: it continues the run in OUTPUT_DIR, or starts it; a run that starts from a file is given "
    "--branch-from FILE (the same training so far) or MODEL.WEIGHTS FILE (weights alone)"
)
WEIGHTS = (
    'weights are given as MODEL.WEIGHTS FILE, or MODEL.WEIGHTS "FILE#model_ema" for their average; --resume takes no '
    "value, and a training that goes on from a file is given --branch-from FILE"
)
FOREIGN = {  # flags of other libraries -> what to write here, in tools that take KEY VALUE pairs
    "--config-file": "FILE",
    "-c --cfg --config --config-path --cfg-file": "--config-file FILE",
    "--cfg-options --opts --options --override --set": "KEY VALUE pairs without a flag, such as SOLVER.BASE_LR 0.01",
    "--work-dir --output-dir --out-dir --save-dir --name": "OUTPUT_DIR FOLDER",
    "--local-rank --launcher": "nothing: what torchrun, mpirun or srun start is recognised; or write --num-gpus N",
    "--gpus --gpu-ids --ngpus --devices --nproc-per-node --num-processes": "--num-gpus N",
    "--nnodes --node-rank --master-addr --master-port":
        "--num-machines N --machine-rank I --dist-url tcp://HOST:PORT",
    "--load-from --weights --pretrained --pretrained-weights --ckpt --checkpoint": "MODEL.WEIGHTS FILE",
    "--resume-from --auto-resume": "--resume and OUTPUT_DIR FOLDER of that run",
    "--eval --evaluate --test --test-only": "--eval-only",
    "-b --batch --batch-size --samples-per-gpu --auto-scale-lr":
        "--scale-to-batch N, which scales rate and schedule, or SOLVER.IMS_PER_BATCH N SOLVER.BASE_LR X",
    "--num-epochs --max-epochs": "--epochs N",
    "--epochs --max-iter --max-iters --iterations": "SOLVER.MAX_ITER N: epochs x images / SOLVER.IMS_PER_BATCH",
    "--patience --early-stopping": "TEST.PATIENCE N: of evaluations",
    "--ema --use-ema --model-ema": "MODEL_EMA.ENABLED True",
    "--lr --learning-rate": "SOLVER.BASE_LR X",
    "--device": "MODEL.DEVICE cuda or cpu",
    "-j --workers --num-workers": "DATALOADER.NUM_WORKERS N: of each process",
    "--seed": "SEED N",
    "--amp --fp16": "SOLVER.AMP.ENABLED True",
    "--imgsz --img-size": "INPUT.MIN_SIZE_TRAIN \"(N,)\" INPUT.MIN_SIZE_TEST N",
    "--data --dataset --data-path": "DATASETS.TRAIN \"('NAME',)\" DATASETS.TEST \"('NAME',)\", see datasets/README.md",
}  # fmt: skip

ELSEWHERE = {  # ... in tools that have the first word of the answer: a flag, or an argument without one
    "--conf --conf-thres --confidence-threshold --score-thr --score-thres --threshold --thresh": "--score S",
    "--source --input --images --image --img": "SOURCE without a flag",
    "--model --weights --checkpoint --ckpt": "MODEL without a flag",
    "--output --output-dir --out-dir --save-dir": "--out DIR",
    "-c --cfg --config": "--config-file FILE",
}  # fmt: skip


class ToolParser(ArgumentParser):
    """Prints the description, a tool's docstring, with its line breaks; rejects abbreviated flags."""

    def __init__(self, **keywords: Any):
        super().__init__(**keywords, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """argparse's, and what to write instead."""
        super().error(f"{shortened(message)}{self.hint(message)}")

    def hint(self, message: str) -> str:
        """For argparse's ``message``: what to write instead of flags that are not known here, or of a mere recipe."""
        if "--resume: ignored" in message:
            return f"; {RESUME}"
        known, takes_keys = self._option_string_actions, any(one.dest == "overrides" for one in self._actions)
        there, hints = {*known, *(one.metavar for one in self._actions)}, {}
        for word in sys.argv[1:]:
            flag = word.partition("=")[0]
            if flag.startswith("-") and flag not in known and (flag in message or "required" in message):
                alike = flag.replace("_", "-").lower()
                table = FOREIGN if takes_keys else ELSEWHERE
                answer = next((answer for flags, answer in table.items() if alike in flags.split()), "")
                answer = answer if takes_keys or answer.split(" ")[0] in there else ""
                hint = did_you_mean(alike, list(known))
                if "required" in message:  # which does not name the flag
                    hint = f"; there is no {flag}{hint}" if flag.startswith("--") else ""
                hints[flag] = f"\n  instead of {flag} write {answer}" if answer else hint
            elif "required: --config-file" in message and word.endswith((".yaml", ".yml", ".py")):
                is_said = "--config-file" in "".join(hints.values())
                hints[""] = "" if is_said else f"; write --config-file {quoted(word)}"
        if "required: --config-file" in message and self.get_default("eval_only") and not hints:
            return next(filter(None, map(_how_to_evaluate, sys.argv[1:])), "")
        return "".join(hints.values())


def _how_to_evaluate(word: str) -> str:
    """What to write for a run's folder or its weights, RUN#model_ema or FILE#model_ema too; "" for another word."""
    name, sign, part = word.rpartition("#") if "#" in word else (word, "", "")
    run, weights = Path(name), Path(name)
    if run.is_dir():
        last = run / "checkpoints" / "last_checkpoint"
        weights = last.with_name(last.read_text().strip() if last.is_file() else "model_final.pth")
    elif run.is_file():
        run = run.parent.parent
    if not (run / "config.yaml").is_file():
        return ""
    return f"; write --config-file {quoted(run / 'config.yaml')} MODEL.WEIGHTS {quoted(f'{weights}{sign}{part}')}"


def seed(text: str) -> int:
    """The type of a flag: a seed, as NumPy takes it."""
    if (number := int(text)) < 0:
        raise ArgumentTypeError(f"{number}, expected 0 or more")
    return number


def numbers(text: str) -> tuple[int, ...]:
    """The type of a flag: 1000,2000 as numbers."""
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError:
        raise ArgumentTypeError(f"{text}, expected whole numbers, such as 1000,2000") from None


GIVEN: list[str] = []  # the folders of --project, as they were given
LOADED: set[Path] = set()


def add_project_flag(parser: ArgumentParser) -> None:
    """``--project FOLDER``: loaded while the command line is parsed, so it is not among the parsed arguments."""
    what = "add the keys and models of this package: projects/NAME"
    parser.add_argument("--project", action=_Load, metavar="FOLDER", default=SUPPRESS, help=what)


def project_flags() -> list[str]:
    """The ``--project`` flags of this command line, for the runs that it starts."""
    return [word for folder in GIVEN for word in ("--project", folder)]


def load_project(folder: Path) -> None:
    """Import the package in ``folder`` and call its ``add()``. Raises UserError for a folder that is no project."""
    folder = find_file(folder).resolve()
    if not (folder / "__init__.py").is_file():
        raise UserError(
            f"--project {folder} is no folder with an __init__.py; give one such as projects/timm_backbones"
        )
    if not folder.name.isidentifier():
        raise UserError(f"--project {folder}: {folder.name} is no name for a Python package; rename the folder")
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))
    try:
        package = import_module(folder.name)
    except Exception as error:  # of anybody's code, or a library that it needs
        raise UserError(
            f"--project {folder} cannot be imported ({type(error).__name__}: {error}); correct it"
        ) from error
    if Path(str(package.__file__)).resolve().parent != folder:
        raise UserError(f"--project {folder}: {package.__file__} has the same name; rename the folder")
    if not hasattr(package, "add"):
        raise UserError(f"--project {folder}: {package.__file__} has no function add(), see projects/README.md")
    package.add()
    LOADED.add(folder)


def missing_project(recipe: Path) -> Path | None:
    """The folder of the project that a recipe belongs to, or None when it is loaded or there is none."""
    folders = (folder for folder in recipe.absolute().parents if (folder / "__init__.py").is_file())
    project = next(folders, None)
    return project if project and project.resolve() not in LOADED else None


class _Load(Action):
    def __call__(self, _parser: ArgumentParser, _args: Namespace, folder: Any, _flag: str | None = None) -> None:
        with exit_on_user_error():
            load_project(Path(folder))
        GIVEN.append(folder)

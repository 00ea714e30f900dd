"""Check a recipe, its data and this machine before a run: lists all errors, and what the run will do, need and write.

    scratch-det check --config-file configs/Digits/quickstart.yaml
    scratch-det check --config-file FILE --num-gpus 8 --images OUTPUT_DIR output/run

Takes the flags of scratch-det train, except --eval-only, and KEY VALUE pairs. A checkpoint given by --resume,
--branch-from or --switch-from is compared with the recipe only when the run starts. Writes nothing except a list of the
images that were read, in ~/.cache/scratch_det.
Exit code 0: ready to train; 2: there are errors, each with its fix.
"""

import signal
import sys
from contextlib import redirect_stdout

from scratch_det.command_line import ToolParser, exit_on_user_error
from scratch_det.engine.command import read_request, run_parser
from scratch_det.errors import EXIT_CODE


def build_parser() -> ToolParser:
    parser = run_parser(__doc__)
    parser.add_argument("--images", action="store_true", help="read every image too: once, later only changed ones")
    parser.add_argument("--json", action="store_true", help="print one json object instead of text")
    return parser


def main() -> None:
    request, flags = read_request(build_parser())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that processes that read images end too
    with exit_on_user_error(reading_only=True, interrupted="interrupted; images that were read need not be read again"):
        from scratch_det.engine.check import as_json, check, verdict  # NumPy: not for --help

        with redirect_stdout(sys.stderr if flags["json"] else sys.stdout):
            say = (lambda text: None) if flags["json"] else print
            report = check(request, flags["num_gpus"], flags["num_machines"], flags["images"], say)
        print(as_json(report) if flags["json"] else verdict(report))
    sys.exit(0 if report.ok else EXIT_CODE)

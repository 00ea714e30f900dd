"""The commands of ``scratch-det``: what each reads from its command line; tools/ has them as scripts.

A command's module has the help as its docstring, ``build_parser``, and ``main``, which ends by SystemExit where the
exit code is not 0.
"""

COMMANDS = {  # each is a module of scratch_det.commands: "view data" is view_data
    "train": "train a detector from a recipe and evaluate it",
    "eval": "evaluate a detector's weights",
    "check": "test recipe, data and machine before a run",
    "config": "print a recipe as merged, or what it changes",
    "predict": "detect in images, folders, videos",
    "export": "a detector as one file, for onnxruntime or torch alone",
    "view data": "a data set, or a recipe's training images, on one page",
    "view results": "what a detector finds beside the truth, worst images first",
    "view curves": "loss and AP of several runs in one picture",
    "analyze errors": "where a detector errs, or two differ, on one page",
    "analyze model": "parameters, multiply-adds and feature maps of a recipe's model",
    "study": "the paper's tables and figures, and your own: plan, run, report",
    "search": "a grid search over keys of a recipe",
    "pretrain": "pre-train a backbone by classification",
    "convert": "weights from one backend to the other",
    "data digits": "make the demo data set",
    "data voc": "XML files of PASCAL VOC's kind to COCO's format",
    "data subsets": "random parts of a data set",
    "data fix": "write a repaired copy of a COCO json",
    "benchmark": "time the parts of this library beside their peers",
    "detectron2": "train a recipe with detectron2's own trainer",
    "completion": "completion of commands and flags for a shell",
}

FOREIGN = {  # names in other libraries
    **dict.fromkeys(("detect", "infer", "inference", "demo"), "predict"),
    **dict.fromkeys(("test", "val", "validate", "evaluate"), "eval"),
    **dict.fromkeys(("fit", "finetune"), "train"),
}


def module_of(command: str) -> str:
    """The module that has its ``build_parser`` and ``main``."""
    return f"scratch_det.commands.{command.replace(' ', '_')}"

"""Every run from scratch against its pre-trained counterpart: they differ in what the paper names, in nothing else."""

import re
from collections.abc import Iterator

from conftest import ROOT

from scratch_det.config.load import flatten, load_config
from scratch_det.evaluation.metrics import SCRATCH
from scratch_det.study import paper
from scratch_det.study.run import PRETRAIN, SEARCH, Run

# Initialisation with its frozen layers, and the length with what goes with it.
NAMED = {"MODEL.WEIGHTS", "MODEL.BACKBONE.FREEZE_AT", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.CHECKPOINT_PERIOD",
         "TEST.EVAL_PERIOD"}  # fmt: skip


def model_and_data(run: Run) -> str:
    """The name without initialisation and length."""
    return re.sub(r"_(\d+[xk])_", "_", run.name.partition("_")[2].replace("_searched", ""))


def pairs() -> Iterator[tuple[Run, Run]]:
    runs = [run for run in paper.runs() if run.kind not in (PRETRAIN, SEARCH)]
    for one in runs:
        yield from (
            (one, other)
            for other in runs
            if one.init == SCRATCH != other.init and model_and_data(one) == model_and_data(other)
        )


def test_a_pair_differs_in_what_the_paper_names() -> None:
    found = list(pairs())
    for run, counterpart in found:
        ours, theirs = (flatten(load_config(ROOT / one.config, one.changes).cfg) for one in (run, counterpart))
        differ = {key for key in ours if ours[key] != theirs[key]}
        assert differ - NAMED == set(), (run.name, counterpart.name)
        assert {"MODEL.WEIGHTS", "MODEL.BACKBONE.FREEZE_AT"} <= differ
    alone = {run.name for run in paper.runs() if run.init == SCRATCH} - {run.name for run, _ in found}
    # The paper has X152 without cascade from scratch alone; the others are a pre-training and a search.
    assert alone == {"scratch_mask_rcnn_X_152_8x32d_FPN_9x_gn_train_aug", "imagenet_X_152_8x32d_gn", "search_1k"}

"""The one list of metrics: a line more, and it is evaluated, written, tabulated, drawn, and offered to a search."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from coco_truth import evaluate
from matplotlib.figure import Figure

from scratch_det.config.load import load_config
from scratch_det.errors import ConfigError
from scratch_det.evaluation.metrics import (
    METRICS,
    Metric,
    all_metrics,
    format_per_class,
    format_table,
    main_metrics,
    main_score,
    metrics_of,
    to_json_numbers,
)
from scratch_det.reading import read_series
from scratch_det.study.search import _check_metric
from scratch_det.visualization.curves import draw_scores


def test_a_new_metric_is_everywhere(train, toy_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "bbox/AP90", Metric("box AP90", "#123456", "v", iou=0.9))
    folder = train("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    assert list(metrics["bbox"])[:7] == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP90"]
    assert metrics["bbox"]["AP90"] <= metrics["bbox"]["AP50"]
    assert "AP90" not in metrics["segm"]
    series = read_series(folder / "metrics.json", 2)
    assert [value for _, value in series["bbox/AP90"]] == [metrics["bbox"]["AP90"]]
    header, _, box, mask = [line.split() for line in format_table(metrics).splitlines()]
    column = header.index("AP90")
    assert (box[column], mask[column]) == (f"{metrics['bbox']['AP90']:.1f}", "-")
    axes = Figure().subplots()
    draw_scores(axes, series)
    (line,) = [line for line in axes.lines if line.get_label().startswith("box AP90")]
    assert (line.get_color(), line.get_marker()) == ("#123456", "v")
    cfg = load_config(toy_recipe).cfg
    _check_metric("bbox/AP90", cfg)
    with pytest.raises(ConfigError, match="bbox/AP90, segm/AP,"):
        _check_metric("segm/AP90", cfg)


def test_values_of_a_new_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AP at one threshold of one size range: a box of IoU 0.92 with a medium object."""
    monkeypatch.setitem(METRICS, "bbox/AP90m", Metric("box", iou=0.9, area="medium"))
    monkeypatch.setitem(METRICS, "bbox/AP95m", Metric("box", iou=0.95, area="medium"))
    monkeypatch.setitem(METRICS, "bbox/AP90l", Metric("box", iou=0.9, area="large"))
    one = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 99, "height": 99}],
        "categories": [{"id": 1, "name": "a"}],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({**content, "annotations": [one]}))
    results = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 46], "score": 0.5}]
    found = evaluate(path, results, ("bbox",))["bbox"]
    assert [found["AP90m"], found["AP95m"]] == pytest.approx([100, 0])
    assert np.isnan(found["AP90l"])


def test_names() -> None:
    """detectron2's names and order; the variants come last."""
    assert list(metrics_of("keypoints")) == ["AP", "AP50", "AP75", "APm", "APl"]
    assert main_score("bbox") == ("bbox", "AP")
    assert main_score("classification") == ("classification", "top1")
    plain = [("bbox", "AP"), ("segm", "AP"), ("keypoints", "AP"), ("classification", "top1")]
    ends = ("", "_TTA", "_EMA", "_EMA_TTA")
    assert list(main_metrics()) == [f"{task}{end}/{score}" for end in ends for task, score in plain]
    augmented = all_metrics()["segm_TTA/AP50"]
    assert (augmented.label, augmented.marker, augmented.iou) == ("mask AP50, test aug", "*", 0.5)
    assert (METRICS["bbox/AP"].axis, Metric("images", percent=False).axis) == ("box AP (%)", "images")


def test_tables() -> None:
    metrics = {"bbox": {"AP": 37.44, "APs": math.nan} | {f"AP-c{i}": float(i) for i in range(5)}}
    header, rule, row = format_table(metrics).splitlines()
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["bbox", "37.4", "-", "-", "-", "-", "-"]
    assert len(header) == len(rule) == len(row)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_per_class(metrics).splitlines()]
    assert lines[0] == ["class", "bbox"] * 3
    assert lines[2:] == [["c0", "0.0", "c2", "2.0", "c4", "4.0"], ["c1", "1.0", "c3", "3.0", "", ""]]


def test_json_numbers_are_strict() -> None:
    numbers = to_json_numbers({"bbox": {"AP": np.float64(1.5), "APs": math.nan}, "n": 3, "time": math.inf})
    assert json.loads(json.dumps(numbers, allow_nan=False)) == {"bbox": {"AP": 1.5, "APs": None}, "n": 3, "time": None}

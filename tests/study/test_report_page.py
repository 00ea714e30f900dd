"""A study's page: complete for what there is, the same bytes again, and safe to open."""

import base64
import html
import io
import json
import math
import re
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from scratch_det.evaluation.metrics import BLUE, PRETRAINED, SCRATCH, VERMILION
from scratch_det.study.experiments import jobs_of, of_place
from scratch_det.study.records import LOSS, Record, collect, load, save, survey
from scratch_det.study.report.figures import draw, figures_of
from scratch_det.study.report.page import Folders, curves, read_folders, study_page
from scratch_det.study.report.results import with_made
from scratch_det.study.report.tables import Table
from scratch_det.study.run import PRETRAIN, TRAIN
from scratch_det.study.study import Study

PLACE = "digits/figure6"
FAILED, BRANCH = "pretrained_keypoint_rcnn_R_18_FPN_3x_gn", "scratch_keypoint_rcnn_R_18_FPN_2x_gn"
TRUNK = "scratch_keypoint_rcnn_R_18_FPN_3x_gn"
EVIL = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium")
BROWSERS_OWN = re.compile(r"(google|googleapis|gvt1)\.com[:/]")  # what Chromium asks for whatever page it shows


def fill(out: Path, times: int = 1) -> None:
    """Two finished runs and their pre-training, one that failed and one that waits for it; ``times`` it was started."""
    environment = {"command": "x --out /home/me", "datasets_root": "/home/me", "python": "3.11.7", "threads": 1,
                   "packages": {"torch": "2.14.1", "numpy": EVIL}, "git": {"commit": "0123456789abcdef", "diff": ""},
                   "earlier_starts": [{"python": "3.0"}] * (times - 1)}  # fmt: skip
    for name, last in ((TRUNK, 1080), (BRANCH, 720), (FAILED, 240)):
        folder = out / name
        folder.mkdir(parents=True)
        rows = [row(i, clock) for clock in range(times) for i in range(clock * 180, last, 60)]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
        (folder / "environment.json").write_text(json.dumps(environment))
        content = {
            "OUTPUT_DIR": str(folder),
            "SEED": 1,
            "VERSION": f"{last}{EVIL}",
            "SOLVER": {"MAX_ITER": last},
            "MODEL": {"DEVICE": "<b>cpu"},
        }
        content["MODEL"]["WEIGHTS"] = f"/home/me/{TRUNK}/backbone.pth" if name == FAILED else ""
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        status = {"iteration": last, "host": f"host{times}", "pid": times}
        (folder / "status.json").write_text(json.dumps(status))
        if name != FAILED:
            result = {
                "iteration": last,
                "seconds": 120 * times,
                "metrics": {"bbox": {"AP": 30.0}, "keypoints": {"AP": 20.0}},
            }
            (folder / "result.json").write_text(json.dumps(result))
            Image.new("RGB", (1200, 900), "red").save(folder / "predictions.png")
    (out / "pretrain_digits_R_18_gn").mkdir()
    (out / "pretrain_digits_R_18_gn" / "result.json").write_text('{"iteration": 4000}')
    (out / "pretrain_digits_R_18_gn" / "backbone.pth").touch()
    (out / "jobs").mkdir()
    (out / "jobs" / f"{FAILED}.exit").write_text("1\n")
    (out / "jobs" / f"{FAILED}.log").write_text(f"--- started now\nTraceback\nRuntimeError: {EVIL}\n")


def row(i: int, clock: int) -> dict[str, Any]:
    return {"iteration": i + 59, "total_loss": 2 - i / 1080, "bbox/AP": i / 36, "keypoints/AP": i / 54, "time": clock}


def records_in(out: Path) -> list[Record]:
    records = collect(survey(jobs_of(of_place(PLACE)), out, {}), out)
    return [with_made(one, Study(PLACE, out, backend="torchvision")) for one in records]


def page_of(out: Path) -> Path:
    records = records_in(out)
    path = out.parent / "page.html"
    rows = (("scratch", "20.0"), (EVIL, "-"))
    tables = [Table("table", f"Table {EVIL}", ("init", "AP"), rows, (f"note {EVIL}",))]
    drawn = draw(figures_of(PLACE, records), out.parent / "figures")
    figures = {path.stem: path.read_text() for path in drawn if path.suffix == ".svg"}
    path.write_text(study_page(f"Study {EVIL}", tables, records, figures, read_folders(records, out, path)))
    return path


def table_of(page: str, section: str) -> list[list[str]]:
    """The cells of a section's table, as text."""
    found = page.partition(f'<section id="{section}')[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", found)]
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in rows]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    fill(tmp_path / "out")
    return page_of(tmp_path / "out")


class TestPage:
    def test_content(self, page: Path) -> None:
        text = page.read_text()
        assert "3 of 5 runs are finished" in text
        assert f'<a href="out/{TRUNK}/">' in text
        assert text.count("data:image/svg+xml") == 1
        assert text.count("data:image/jpeg") == 1  # a branch has its trunk's
        assert "with changes" not in text
        assert ["git commit", "0123456789abcdef", "all"] in table_of(text, "environment")

    def test_numbers_of_the_curves(self, page: Path) -> None:
        """What curves.js draws: a branch from its trunk's last point on, names and colours."""
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])
        assert data["metrics"]["bbox/AP"] == "box AP (%)"
        assert data["metrics"][LOSS] == "training loss"
        (lines,) = data["groups"].values()
        runs = {line["run"]: line for line in lines}
        assert {name: (line["family"], line["colour"]) for name, line in runs.items()} == {
            "scratch, 3x": ("scratch", VERMILION),
            "scratch, 2x": ("scratch", VERMILION),
            "pretrained, 3x": ("pretrained", BLUE),
        }
        assert runs["scratch, 3x"]["curves"]["bbox/AP"][::17] == [[60, 0.0], [1080, 28.3333]]
        branch = [[480, 11.6667], [540, 13.3333], [600, 15.0], [660, 16.6667], [720, 18.3333]]
        assert runs["scratch, 2x"]["curves"]["bbox/AP"] == branch
        assert runs["pretrained, 3x"]["curves"][LOSS] == [[60, 2.0], [120, 1.9444], [180, 1.8889], [240, 1.8333]]

    def test_seeds_are_a_mean_with_a_range(self) -> None:
        runs = [run for run in of_place("digits/figure1") if run.shown == "scratch, 6x"]
        ends = zip(runs, (20.0, 20.0, 30.0, 40.0, 40.0), strict=True)
        records = [Record(run, "finished", 0, 2160, curves={"bbox/AP": ((2160, ap),)}) for run, ap in ends]
        assert curves(records)["Table 1: box AP, on digits"][0]["curves"]["bbox/AP"] == [(2160, 30.0, 20.0, 40.0)]

    def test_tables(self, page: Path) -> None:
        text = page.read_text()
        assert table_of(text, "table")[:2] == [["init", "AP"], ["scratch", "20.0"]]
        assert table_of(text, "runs")[:3] == [
            ["run", "status", "iterations", "box AP (%)", "keypoint AP (%)", "time (min)", "row or curve", "in"],
            [TRUNK, "finished", "1,080", "30.0", "20.0", "2.0", "scratch, 3x", f"{PLACE}, digits/claims"],
            [
                BRANCH,
                "finished",
                "720 (a branch at 480)",
                "30.0",
                "20.0",
                "2.0",
                "scratch, 2x",
                f"{PLACE}, digits/claims",
            ],
        ]
        assert table_of(text, "failed") == [["run", "error"], [FAILED, f"exit code 1: RuntimeError: {EVIL}"]]
        assert ["torch", "2.14.1", "all"] in table_of(text, "environment")

    def test_pictures(self, page: Path) -> None:
        """A smaller copy of the trunk's predictions, and the figure as it was drawn."""
        text = page.read_text()
        (jpeg,) = re.findall(rf'<img src="data:image/jpeg;base64,(.*?)" alt="{TRUNK}"', text)
        with Image.open(io.BytesIO(base64.b64decode(jpeg))) as picture:
            assert picture.size == (1000, 750)
            assert picture.convert("RGB").getpixel((500, 300)) == (254, 0, 0)  # as JPEG has "red"
        (svg,) = re.findall(
            r'<img src="data:image/svg\+xml;base64,(.*?)" alt="Figure 6 in miniature: R18-FPN with GN"', text
        )
        assert "Figure 6 in miniature: R18-FPN with GN" in base64.b64decode(svg).decode()

    def test_recipes_differ_in(self, page: Path) -> None:
        header, usual, *rows = table_of(page.read_text(), "config-keys-that-differ")
        assert header == ["run", "MODEL.WEIGHTS", "SOLVER.MAX_ITER", "VERSION"]
        assert usual[:2] == ["most frequent", ""]
        assert [row[1] for row in rows] == ["", "", f"{TRUNK}/backbone.pth"]

    def test_everything_is_escaped(self, page: Path) -> None:
        text = page.read_text()
        assert EVIL not in text
        # title twice; the table's, also in the contents and its box's label; a cell, a note, the failed run's; a
        # version, and a key's value in three runs
        assert text.count(html.escape(EVIL)) == 2 + 3 + 3 + 1 + 3
        assert text.count("<script") == text.count("</script>") == 3

    def test_says_nothing_of_this_machine(self, page: Path) -> None:
        text = page.read_text()
        assert "/home/me" not in text
        assert str(page.parent) not in text
        assert "host1" not in text

    def test_the_same_after_an_interruption(self, page: Path, tmp_path: Path) -> None:
        fill(tmp_path / "interrupted" / "out", times=2)
        times = re.compile(r"<td>\d\.\d</td><td>(?=scratch, |pretrained, )")
        again = page_of(tmp_path / "interrupted" / "out").read_text()
        assert times.sub("", again) == times.sub("", page.read_text()) != page.read_text()

    def test_what_a_checkout_had_changed(self, page: Path) -> None:
        path = page.parent / "out" / TRUNK / "environment.json"
        path.write_text(path.read_text().replace('"diff": ""', '"diff": "x"'))
        text = page_of(page.parent / "out").read_text()
        rows = table_of(text, "environment")
        assert ["git commit", "0123456789abcdef with changes", TRUNK] in rows
        assert ["git commit", "0123456789abcdef", "the others"] in rows

    def test_which_runs_are_shown(self, tmp_path: Path) -> None:
        """Curves of the first place without repetitions; six pictures; no config keys of classifiers."""
        records = []
        for run in of_place("digits"):
            if run.kind in (TRAIN, PRETRAIN):
                curves_of = {"bbox/AP": ((30, 1.0), (60, math.nan))} if run.kind == TRAIN else {}
                records.append(Record(run, "finished", 0, run.iterations, curves=curves_of))
                (tmp_path / "a study" / run.name).mkdir(parents=True)
                (tmp_path / "a study" / run.name / "config.yaml").write_text(f"KIND: {run.kind}\nX: {run.k}\n")
                Image.new("RGB", (9, 9)).save(tmp_path / "a study" / run.name / "predictions.png")
        runs = read_folders(records, tmp_path / "a study", tmp_path / "page.html")
        assert runs.links[records[0].run.name] == f"a%20study/{records[0].run.name}/"
        pictured = [*runs.pictures]
        assert len(pictured) == 6
        assert not any("_seed" in name for name in pictured)
        lines = [line for group in curves(records).values() for line in group]
        assert {line["run"] for line in lines} > {"scratch, 6x", "third, scratch, 3x", "none, 3x"}
        assert {point[:2] for line in lines for point in line["curves"]["bbox/AP"]} == {(30, 1.0)}
        table = table_of(study_page("x", [], records, {}, runs), "config-keys-that-differ")
        assert table[0] == ["run", "X"]

    def test_broken_files(self, page: Path) -> None:
        """A picture and a recipe can be done without, as ``check_folders`` has looked at what counts."""
        for name in ("config.yaml", "predictions.png"):
            (page.parent / "out" / TRUNK / name).write_text("{")
        assert page_of(page.parent / "out").read_text().count("data:image/jpeg") == 0

    def test_the_same_from_csv(self, page: Path, tmp_path: Path) -> None:
        """What is kept of a study gives the figures and curves that its folders gave."""
        records = records_in(page.parent / "out")
        save(records, tmp_path / "results")
        assert load(tmp_path / "results") == [replace(one, seconds=None, made={}) for one in records]

    def test_colours_are_those_of_the_initialisations(self) -> None:
        """However many schedules and seeds there are; where several lines have one initialisation, other colours."""
        records = [Record(run, "finished", 0, 9, curves={LOSS: ((9, 1.0),)}) for run in of_place("digits/table1")]
        drawn = curves(records)["Table 1: box AP, on digits"]
        assert {line["family"]: line["colour"] for line in drawn} == {SCRATCH: VERMILION, PRETRAINED: BLUE}
        norms = [Record(run, "finished", 0, 9, curves={LOSS: ((9, 1.0),)}) for run in of_place("digits/norms")]
        families = {line["family"]: line["colour"] for line in curves(norms)["Normalisation, on digits"]}
        assert len(families) == len({*families.values()}) == 6
        assert not {*families.values()} & {VERMILION, BLUE}

    def test_lines_of_a_plot_have_different_colours(self) -> None:
        records = [Record(run, "finished", 0, 9, curves={LOSS: ((9, 1.0),)}) for run in of_place("paper")]
        for title, lines in curves(records).items():
            families = {line["family"]: line["colour"] for line in lines}
            assert len(families) == len({*families.values()}), title

    def test_without_folders(self, tmp_path: Path) -> None:
        records = [Record(run, "finished", 0, 0) for run in of_place(PLACE)]
        text = study_page("A study", [], records, {}, Folders())
        assert "4 of 4 runs are finished" in text
        assert 'href="out' not in text


DRIVER = """<script>addEventListener("load", () => {
  const said = {}, plot = document.getElementById("plot"), tip = document.getElementById("tip");
  const paths = () => plot.querySelectorAll("path").length;
  const options = (id) => [...document.getElementById(id).options].map((option) => option.value);
  said.options = [options("metric"), options("group")];
  said.all = paths();
  const button = document.querySelector("#legend button");
  button.click();
  said.without = [paths(), button.getAttribute("aria-pressed")];
  button.click();
  said.again = paths();
  const dot = plot.querySelector("circle").getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: dot.x + 3, clientY: dot.y + 3}));
  said.tip = tip.hidden ? "" : tip.textContent;
  const table = document.querySelector("#runs table"), head = table.tHead.rows[0].cells[2];
  said.sorted = ["first", "second", "third", "fourth"].map(() => {
    const first = [...table.tBodies[0].rows].slice(0, 3).map((row) => row.cells[2].textContent);
    const found = [head.ariaSort, ...first];
    head.querySelector("button").click();
    return found;
  });
  said.wide = document.documentElement.scrollWidth > innerWidth;
  document.title = JSON.stringify(said);
});
addEventListener("securitypolicyviolation", (event) => document.body.append("violation: " + event.blockedURI));
</script>"""


class Proxy(socketserver.ThreadingTCPServer):
    """Takes every connection of the browser, and notes the first line."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Note)


class Note(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.server.asked.append(self.rfile.readline().decode("latin1"))


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def browse(page: Path, proxy: Proxy, width: int = 1400) -> tuple[str, list[str]]:
    """The page as the browser has it in the end, and what was asked of the network for it.

    A connection that is opened for later and closed unused asks for nothing.
    """
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}",
             "--disable-background-networking", f"--proxy-server=http://127.0.0.1:{proxy.server_address[1]}",
             "--proxy-bypass-list=<-loopback>", f"--window-size={width},900", "--virtual-time-budget=3000"]  # fmt: skip
    command = [str(CHROMIUM), *words, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in proxy.asked if line and not BROWSERS_OWN.search(line)]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
class TestBrowser:
    @pytest.mark.parametrize("width", [1400, 500])
    def test_curves(self, page: Path, proxy: Proxy, width: int) -> None:
        """Drawn, toggled and told of; the tables are there, in their own boxes, and sorted; nothing leaves."""
        text = page.read_text()
        page.write_text(text.replace("<head>", "<head>" + DRIVER, 1))
        shown, asked = browse(page, proxy, width)
        said = json.loads(html.unescape(re.search("<title>(.*)</title>", shown)[1]))
        assert said["options"] == [["bbox/AP", "keypoints/AP", LOSS], ["Figure 6, on digits"]]
        assert said["all"] == 3
        assert said["without"] == [1, "false"]
        assert said["again"] == 3
        assert re.fullmatch(r"scratch, 3x: box AP \(%\) 28.33 after 1,080 iterations", said["tip"])
        assert said["sorted"] == [
            ["none", "1,080", "720 (a branch at 480)", "4,000"],
            ["ascending", "0 (a branch at 480)", "240", "720 (a branch at 480)"],
            ["descending", "4,000", "1,080", "720 (a branch at 480)"],
            ["none", "1,080", "720 (a branch at 480)", "4,000"],
        ]
        assert not said["wide"]
        assert shown.count("<table") == 5
        assert "violation:" not in shown.partition("</script>")[2]
        assert asked == []

    def test_what_would_leave_is_stopped(self, page: Path, proxy: Proxy) -> None:
        """The policy does it: without it the same page asks."""
        text = page.read_text().replace(
            "<h1>", "<img src='http://canary.invalid/x'><script>document.title = 1</script><h1>"
        )
        page.write_text(text)
        shown, asked = browse(page, proxy)
        assert asked == []
        assert "<title>1</title>" not in shown
        page.write_text(text.replace("Content-Security-Policy", "none"))
        shown, asked = browse(page, proxy)
        assert any("canary.invalid" in line for line in asked)
        assert "<title>1</title>" in shown

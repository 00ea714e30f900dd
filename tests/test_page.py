"""A study's figures and its page: complete for what there is, the same bytes again, and safe to open."""

import html
import json
import re
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from PIL import Image

from scratch_det.study.experiment import EVALUATE, TRAIN
from scratch_det.study.experiments import find, of_place
from scratch_det.study.figures import draw, figures_of
from scratch_det.study.job import jobs_of
from scratch_det.study.outcome import LOSS, Outcome, collect
from scratch_det.study.page import write_page
from scratch_det.study.panels import mean, own_part, thin
from scratch_det.study.run_page import read_runs
from scratch_det.study.standing import survey

PLACE = "digits/figure6"
FAILED, BRANCH = "pretrained_keypoint_rcnn_R_18_FPN_3x_gn", "scratch_keypoint_rcnn_R_18_FPN_2x_gn"
TRUNK = "scratch_keypoint_rcnn_R_18_FPN_3x_gn"
EVIL = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium")
BROWSERS_OWN = re.compile(r"(google|googleapis|gvt1)\.com[:/]")  # what Chromium asks for whatever page it shows


def made_up(place: str) -> list[Outcome]:
    """Every run of ``place`` finished, AP rising evenly to 40 and the loss falling."""
    outcomes = []
    for job in jobs_of(of_place(place)):
        run = job.run
        if run.kind == EVALUATE:
            metrics = {"bbox_TTA/AP": 42.0, "segm_TTA/AP": 37.0, "bbox/AP": 40.0, "segm/AP": 35.0}
            outcomes.append(Outcome(run, "finished", 0, 0, metrics))
            continue
        points = [run.iterations * part // 10 for part in range(1, 11)]
        ap = tuple((point, 40 * point / run.iterations) for point in points)
        names = ("bbox/AP", "segm/AP", "keypoints/AP") if run.kind == TRAIN else ()
        loss = {LOSS: tuple((point, 2 - point / run.iterations) for point in points)}
        curves = dict.fromkeys(names, ap) | loss
        outcomes.append(Outcome(run, "finished", job.start, run.iterations, dict.fromkeys(names, 40.0), curves))
    return outcomes


class TestFigures:
    @pytest.mark.parametrize("whole", ["digits", "paper"])
    def test_all(self, whole: str, datasets_root: Path) -> None:
        """On digits there is no second body, and so no Figure 3."""
        names = {f"figure{number}" for number in range(1, 9)}
        expected = names if whole == "paper" else names - {"figure3"} | {"norms"}
        found = figures_of(whole, made_up(whole))
        assert set(found) == expected
        small = " in miniature" * (whole == "digits")
        for name in expected & names:
            assert found[name].get_suptitle().startswith(f"Figure {name[-1]}{small}: ")

    def test_those_whose_runs_are_all_there(self, datasets_root: Path) -> None:
        assert list(figures_of("digits/table1", made_up("digits/table1"))) == ["figure1", "figure2"]
        assert list(figures_of("digits/smoke", made_up("digits/smoke"))) == ["smoke"]

    def test_partial(self, datasets_root: Path) -> None:
        waiting = [Outcome(one.run, "waiting", one.start, 0) for one in made_up("digits")]
        assert list(figures_of("digits", waiting)) == ["figure2"]
        some = [one for one in made_up("digits/figure1") if one.run.init == "scratch"][1:]
        (axes, *_) = figures_of("digits/figure1", some)["figure1"].axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["random initialisation, mean of 3 seeds"]

    def test_an_unfinished_run_is_no_bar(self) -> None:
        unfinished = [replace(one, state="interrupted") for one in made_up("digits/figure5")]
        assert figures_of("digits/figure5", unfinished) == {}

    def test_ends_are_marked(self) -> None:
        """Five schedules of two initialisations, and the usual length of fine-tuning."""
        (axes, *_) = figures_of("figure1", made_up("figure1"))["figure1"].axes
        ends = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
        assert sorted(ends) == sorted(2 * [180_000, 270_000, 360_000, 450_000, 540_000])
        assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [2 * [180_000]]

    def test_the_same_bytes(self, tmp_path: Path) -> None:
        first, again = (draw("figure8", made_up("figure8"), tmp_path / name) for name in ("first", "again"))
        assert [path.name for path in first] == ["figure8.svg", "figure8.png"]
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
        assert "date" not in first[0].read_text()
        with Image.open(first[1]) as picture:
            assert picture.width == 1400


class TestCurves:
    def test_a_branch_begins_at_its_trunk(self) -> None:
        curve = ((60, 1.0), (240, 2.0), (300, 3.0), (360, 4.0))
        branch = Outcome(find(BRANCH), "finished", 240, 360, curves={"bbox/AP": curve})
        assert own_part(branch, "bbox/AP", {TRUNK}) == curve[1:]
        assert own_part(branch, "bbox/AP", set()) == curve

    def test_mean_of_what_all_have(self) -> None:
        assert mean([((1, 2.0), (2, 4.0), (3, 9.0)), ((1, 4.0), (3, 1.0))]) == ((1, 3.0), (3, 5.0))

    def test_thin(self) -> None:
        curve = tuple((point, float(point % 5)) for point in range(1000))
        assert len(thin(curve, 200)) == 200
        assert {value for _, value in thin(curve, 200)} == {2.0}
        assert thin(curve, 1000) == curve


@dataclass
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())


def fill(out: Path, times: int = 1) -> None:
    """Two finished runs, one that failed and one that waits for it; ``times`` it was started."""
    environment = {"command": "x --out /home/me", "datasets_root": "/home/me", "python": "3.11.7", "threads": 1,
                   "packages": {"torch": "2.14.1"}, "git": {"commit": "0123456789abcdef", "diff": ""},
                   "earlier_starts": [{"python": "3.0"}] * (times - 1)}  # fmt: skip
    for name, last in ((TRUNK, 540), (BRANCH, 360), (FAILED, 120)):
        folder = out / name
        folder.mkdir(parents=True)
        rows = [row(i, clock) for clock in range(times) for i in range(clock * 90, last, 30)]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
        (folder / "environment.json").write_text(json.dumps(environment))
        content = {"OUTPUT_DIR": str(folder), "SEED": 1, "SOLVER": {"MAX_ITER": last}, "MODEL": {"DEVICE": "<b>cpu"}}
        content["MODEL"]["WEIGHTS"] = f"/home/me/{TRUNK}/backbone.pth" if name == FAILED else ""
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        status = {"iteration": last, "host": f"host{times}", "pid": times}
        (folder / "status.json").write_text(json.dumps(status))
        if name != FAILED:
            result = {"iteration": last, "seconds": times, "metrics": {"bbox": {"AP": 30.0}, "keypoints": {"AP": 20.0}}}
            (folder / "result.json").write_text(json.dumps(result))
            Image.new("RGB", (1200, 900), "red").save(folder / "predictions.png")
    (out / "jobs").mkdir()
    (out / "jobs" / f"{FAILED}.failed").write_text(f"Traceback\nRuntimeError: {EVIL}\n")


def row(i: int, clock: int) -> dict[str, Any]:
    return {"iteration": i + 29, "total_loss": 2 - i / 540, "bbox/AP": i / 18, "keypoints/AP": i / 27, "time": clock}


def page_of(out: Path) -> Path:
    outcomes = collect(survey(jobs_of(of_place(PLACE)), out, set()), out)
    path = out.parent / "page.html"
    tables = [Table(f"Table {EVIL}", ("init", "AP"), [("scratch", "20.0"), (EVIL, "-")], [f"note {EVIL}"])]
    return write_page(
        path, f"Study {EVIL}", tables, outcomes, figures_of(PLACE, outcomes), read_runs(outcomes, out, path)
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    fill(tmp_path / "out")
    return page_of(tmp_path / "out")


class TestPage:
    def test_content(self, page: Path) -> None:
        text = page.read_text()
        assert "2 of 5 runs are finished" in text
        assert f'<a href="out/{TRUNK}/">' in text
        assert text.count("data:image/svg+xml") == 1
        assert text.count("data:image/jpeg") == 1  # a branch has its trunk's
        assert "with changes" not in text
        assert "<td>0123456789ab</td><td>all</td>" in text

    def test_recipes_differ_in(self, page: Path) -> None:
        table = page.read_text().partition('<table id="differences">')[2].partition("</table>")[0].replace("<wbr>", "")
        assert re.findall(r"<th>([A-Z_.]+)</th>", table) == ["MODEL.WEIGHTS", "SOLVER.MAX_ITER"]
        assert f"<td>{TRUNK}/backbone.pth</td>" in table

    def test_everything_is_escaped(self, page: Path) -> None:
        text = page.read_text()
        assert EVIL not in text
        assert text.count(html.escape(EVIL)) == 6  # title twice, the table's title, a cell, its note, the failed run's
        assert text.count("<script") == text.count("</script>") == 2

    def test_says_nothing_of_this_machine(self, page: Path) -> None:
        text = page.read_text()
        assert "/home/me" not in text
        assert str(page.parent) not in text
        assert "host1" not in text

    def test_the_same_after_an_interruption(self, page: Path, tmp_path: Path) -> None:
        fill(tmp_path / "interrupted" / "out", times=2)
        assert page_of(tmp_path / "interrupted" / "out").read_bytes() == page.read_bytes()

    def test_broken_files_are_left_out(self, page: Path) -> None:
        for name in ("config.yaml", "environment.json", "predictions.png"):
            (page.parent / "out" / TRUNK / name).write_text("{")
        assert page_of(page.parent / "out").read_text().count("data:image/jpeg") == 0

    def test_without_folders(self, tmp_path: Path) -> None:
        text = write_page(tmp_path / "page.html", "A study", [], made_up(PLACE), {}, []).read_text()
        assert "5 of 5 runs are finished" in text
        assert 'href="out' not in text


DRIVER = """<script>addEventListener("load", () => {
  const said = {}, plot = document.getElementById("plot"), tip = document.getElementById("tip");
  const paths = () => plot.querySelectorAll("path").length;
  const button = (name) => document.querySelector(`#legend button[title="${name}"]`);
  said.options = [...document.getElementById("metric").options].map((option) => option.value);
  said.all = paths();
  button("BRANCH").click();
  said.without = [paths(), button("BRANCH").getAttribute("aria-pressed")];
  document.querySelector("#legend .family").click();
  said.again = paths();
  const dot = plot.querySelector("circle").getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: dot.x + 3, clientY: dot.y + 3}));
  said.tip = tip.hidden ? "" : tip.textContent;
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
    """The page as the browser has it in the end, and what was asked of the network for it."""
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}",
             "--disable-background-networking", f"--proxy-server=http://127.0.0.1:{proxy.server_address[1]}",
             "--proxy-bypass-list=<-loopback>", f"--window-size={width},900", "--virtual-time-budget=3000"]  # fmt: skip
    command = [str(CHROMIUM), *words, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in proxy.asked if not BROWSERS_OWN.search(line)]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
class TestBrowser:
    @pytest.mark.parametrize("width", [1400, 500])
    def test_curves(self, page: Path, proxy: Proxy, width: int) -> None:
        """Drawn, toggled and told of; the tables are there, in their own boxes; nothing leaves."""
        text = page.read_text()
        page.write_text(text.replace("<head>", "<head>" + DRIVER.replace("BRANCH", BRANCH), 1))
        shown, asked = browse(page, proxy, width)
        said = json.loads(html.unescape(re.search("<title>(.*)</title>", shown)[1]))
        assert said["options"] == ["bbox/AP", "keypoints/AP", LOSS]
        assert said["all"] == 3
        assert said["without"] == [2, "false"]
        assert said["again"] == 3
        assert re.fullmatch(rf"{TRUNK}: box AP 28.33 after 540 iterations", said["tip"])
        assert not said["wide"]
        assert shown.count("<table") == 4
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


def test_files_are_packaged() -> None:
    named = re.search(r"package_data=(.*)", (ROOT / "setup.py").read_text())[1]
    assert all(f"study/*.{kind}" in named for kind in ("html", "css", "js"))

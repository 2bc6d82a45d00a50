"""The page about runs: what is on it, that nothing of a run's files can act on it, that a browser shows it whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mirai_ds.analysis import figures
from mirai_ds.analysis import report_page as page
from mirai_ds.config import dump, load
from mirai_ds.paper.catalogue import numbers_at_marks
from mirai_ds.tracking.pictures import save_png
from tests.analysis.fake import cli, curve, write_run

HOSTILE = '</title><script>document.title="owned"</script><img src="http://example.org/x.png" onerror=alert(1)>$x_1$'
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
)  # fmt: skip


class Page(HTMLParser):
    """Tags, texts and everything that a tag refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def a_run(folder: Path, place: str, **changes: object) -> Path:
    run = write_run(folder / place, records=[{**r, "cosine/head1": 0.5} for r in curve()], **changes)
    (run / "outcome").write_text("finished at step 80\n")
    rng = np.random.default_rng(0)
    for step in (40, 80):
        save_png(run / "samples" / f"step-{step:08d}.png", rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A baseline and a Mirai-E run; the latter evaluated and mapped."""
    base = a_run(tmp_path, "base", name="base", foresight__method="none", optimizer__lr="1e-3")
    mirai = a_run(tmp_path, "mirai", name="mirai")
    (mirai / "evaluations").mkdir()
    (mirai / "evaluations" / "cfg-2.json").write_text(json.dumps({
        "fid": 4.34, "sfid": 6.5, "inception_score": 201.25, "precision": 0.81, "recall": 0.52, "num_samples": 50000,
        "reference": {"name": "VIRTUAL_imagenet256_labeled"}, "protocol": {"cfg_scale": 2.0, "weights": "ema"},
    }))  # fmt: skip
    (mirai / "evaluations" / "torn.json").write_text('{"fid": 1')
    save_png(mirai / "maps" / "layer-08-tsne.png", np.zeros((20, 20, 3), np.uint8))
    (mirai / "maps" / "layer-08-tsne.json").write_text(json.dumps({
        "runs": [{"run": "mirai", "layer": 8, "weights": "ema", "images": 256, "neighbour_cosine": 0.75,
                  "random_pair_cosine": 0.25, "smoothness": 0.5, "ci95": None}],
    }))  # fmt: skip
    return [base, mirai]


def written(tmp_path: Path, *runs: Path) -> tuple[Path, Page]:
    out = tmp_path / "report.html"
    done = cli("report", *runs, "--out", out)
    assert done.exit_code == 0, done.output
    return out, Page(out.read_text(encoding="utf-8"))


def test_everything_is_there(runs: list[Path], tmp_path: Path) -> None:
    out, seen = written(tmp_path, *runs)
    html = out.read_text(encoding="utf-8")
    for text in (
        "finished: at step 80", "foresight.method", "'none'", "'mirai-e'", "optimizer.lr", "4.34", "201.25", "50000",
        "protocol.cfg_scale 2.0", "VIRTUAL_imagenet256_labeled", "held_out/ntp_ema", "layer-08-tsne", "step-00000040",
    ):  # fmt: skip
        assert text in seen.text, text
    # loss, held out, cosine, lr, speed; two samples a run; one map
    assert html.count('src="data:image/svg+xml;base64,') == 5
    assert html.count('src="data:image/png;base64,') == 5
    assert "train.global_batch_size" not in seen.text  # the same in both
    assert seen.text.index("How they ended") < seen.text.index("Scores") < seen.text.index("Curves")


def test_nothing_is_loaded_and_nothing_runs(runs: list[Path], tmp_path: Path) -> None:
    _, seen = written(tmp_path, *runs)
    assert all(link.startswith("data:") for link in seen.links)
    assert "script" not in seen.tags
    assert seen.handlers == []


def test_a_hostile_run_changes_nothing(tmp_path: Path) -> None:
    """Names, outcomes, metrics, file names and notes are text, whatever they hold; also in the curves' legends."""
    run = a_run(tmp_path, "x<img src=q onerror=alert(2)>")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"^name: .*", "name: " + json.dumps(HOSTILE), text, flags=re.M))
    (run / "outcome").write_text(f"failed {HOSTILE}\n")
    (run / "evaluations").mkdir()
    (run / "evaluations" / "<b>.json").write_text(json.dumps({"fid": 1.0, "protocol": {HOSTILE: HOSTILE}}))
    out, seen = written(tmp_path, run)
    html = out.read_text(encoding="utf-8")
    assert "script" not in seen.tags
    assert seen.handlers == []
    assert all(link.startswith("data:") for link in seen.links)
    assert HOSTILE in seen.text.replace("\n", "")
    assert html.count("<title>") == 1
    assert "<b>" not in html.replace("&lt;b&gt;", "")


def rows_of(out: Path) -> list[list[str]]:
    """Every table row of a page as its cells' texts."""
    html = out.read_text(encoding="utf-8")
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]


def test_the_papers_numbers_stand_beside(tmp_path: Path) -> None:
    """A run of a shipped recipe, evaluated: the paper's FID and IS of Mirai-E on LlamaGen-B after 80 epochs below."""
    run = write_run(tmp_path / "run", records=[])
    (run / "config.yaml").write_text(dump(load("mirai-e-b-80")))
    (run / "evaluations").mkdir()
    (run / "evaluations" / "epoch-80.json").write_text(json.dumps({
        "fid": 5.31, "sfid": 6.7, "inception_score": 195.5, "precision": 0.84, "recall": 0.46, "num_samples": 50000,
        "reference": {"name": "VIRTUAL_imagenet256_labeled"}, "protocol": {"cfg_scale": 2.0},
    }))  # fmt: skip
    out, seen = written(tmp_path, run)
    found = rows_of(out)
    ours = next(i for i, row in enumerate(found) if row[1:2] == ["epoch-80"])
    assert found[ours][2:7] == ["5.31", "6.7", "195.5", "0.84", "0.46"]
    assert found[ours + 1] == [
        "mirai-e-b-80: the paper&#39;s", "80 epochs", "5.22", "", "197.14", "", "", "Tables 1, 2, 5, 9, 10"
    ]  # fmt: skip
    assert "is not the paper's run" not in seen.text

    (run / "config.yaml").write_text(dump(load("mirai-e-b-80", ["foresight.layer=6"])))
    _, seen = written(tmp_path, run)
    assert "mirai-e-b-80 is not the paper's run: foresight.layer: 6, the recipe has 8" in seen.text


def test_numbers_of_the_same_run_under_another_name_and_of_twins() -> None:
    """Mirai-E's 300-epoch run is the 80-epoch one up to there; a twin's name leads to its recipe."""
    numbers = dict(numbers_at_marks("mirai-e-b"))
    assert numbers[400_320] == dict(numbers_at_marks("mirai-e-b-80"))[400_320]
    assert page.recipe_of("mirai-e-b-80-paper") == page.recipe_of("mirai-e-b-80-text") == "mirai-e-b-80"
    assert page.recipe_of("llamagen-b-text") is None  # somebody's own name: a baseline has no twin
    assert page.recipe_of("mine") is None
    assert numbers_at_marks("digits-baseline") == []


def an_evaluation(fid: float, step: int, **protocol: object) -> str:
    return json.dumps({
        "fid": fid, "num_samples": 50_000, "reference": {"name": "VIRTUAL_imagenet256_labeled", "standard": True},
        "protocol": {"cfg_scale": 2.0, "weights": "ema", "step": step, **protocol},
    })  # fmt: skip


def test_fid_over_epochs_as_in_fig_7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs by the run's own records, else ImageNet's; another protocol is a curve of its own, the paper's crosses."""
    run = write_run(tmp_path / "run", records=[])
    (run / "config.yaml").write_text(dump(load("mirai-e-b")))
    (run / "evaluations").mkdir()
    texts = {"40": an_evaluation(7.9, 200_160), "80": an_evaluation(5.3, 400_320)}
    for name, text in {**texts, "raw": an_evaluation(6.1, 400_320, weights="raw")}.items():
        (run / "evaluations" / f"{name}.json").write_text(text)
    mine = write_run(tmp_path / "mine", records=[{"step": 200, "epoch": 4.0, "loss/ntp": 1.0}])
    (mine / "evaluations").mkdir()
    (mine / "evaluations" / "a.json").write_text(an_evaluation(30.0, 100))
    (mine / "evaluations" / "b.json").write_text(an_evaluation(20.0, 200))
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures, "chart", lambda title, curves, *_, **named: drawn.setdefault(title, (curves, named)))
    named = [("mirai-e-b", page.inspect_run(run)), ("mine", page.inspect_run(mine))]
    list(page._fid_chart(named))
    curves, options = drawn["FID over epochs"]
    assert curves["mirai-e-b"] == {40.0: 7.9, 80.0: 5.3}
    assert curves["mirai-e-b, another protocol"] == {80.0: 6.1}
    assert curves["mine, another protocol"] == {2.0: 30.0, 4.0: 20.0}  # its recipe's guidance is another
    assert options == {"xlabel": "epoch", "paper": {"mirai-e-b": {80.0: 5.22, 300.0: 4.49}}}


def test_the_page_draws_it(tmp_path: Path) -> None:
    """One evaluation beside the paper's numbers is a chart already."""
    run = write_run(tmp_path / "run", records=[])
    (run / "config.yaml").write_text(dump(load("llamagen-b-80")))
    (run / "evaluations").mkdir()
    (run / "evaluations" / "a.json").write_text(an_evaluation(6.5, 200_160))
    out, _ = written(tmp_path, run)
    assert 'alt="FID over epochs"' in out.read_text(encoding="utf-8")


def test_torn_and_empty_runs_are_no_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "torn", records=[])
    (run / "samples").mkdir()
    (run / "samples" / "step-00000001.png").write_bytes(b"no picture")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/ntp": null}\n{"step"')
    _, seen = written(tmp_path, run)
    assert "no outcome written" in seen.text
    assert "1 unreadable line" in seen.text


def test_mistakes(tmp_path: Path, runs: list[Path]) -> None:
    done = cli("report", tmp_path / "nothing")
    assert done.exit_code == 2
    assert "no such folder" in done.output
    (tmp_path / "file").write_text("")
    done = cli("report", runs[0], "--out", tmp_path / "file" / "r.html")
    assert done.exit_code == 2
    assert "cannot be written" in done.output


def test_curves_are_thinned_and_gaps_left_out() -> None:
    steps, values = figures.thinned({s: float(s) if s != 7 else float("nan") for s in range(1, 5001)}, most=100)
    assert len(steps) <= 101
    assert (steps[0], steps[-1], values[-1]) == (1, 5000, 5000.0)
    assert figures.chart("t", {"a": {1: 1.0}}, "") is None
    assert figures.chart("t", {"_a": {1: 1.0, 2: 2.0}}, "") == figures.chart("t", {"_a": {1: 1.0, 2: 2.0}}, "")


def browse(out: Path, folder: Path, *flags: str) -> tuple[str, str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}", *flags, out.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_it_whole(runs: list[Path], tmp_path: Path) -> None:
    """Every figure is decoded and has a size, the console says nothing, and the policy stops a foreign request.

    The page itself runs nothing; a copy of it gets a script that writes down what the browser made of the figures.
    """
    out, seen = written(tmp_path, *runs)
    probe = (
        "<script>onload=()=>{document.body.dataset.sizes=[...document.images].map(i=>i.naturalWidth*i.naturalHeight)"
        ";document.body.dataset.height=document.body.scrollHeight}</script></body>"
    )
    text = out.read_text(encoding="utf-8")
    copy = tmp_path / "probed.html"
    copy.write_text(text.replace("default-src 'none'", "script-src 'unsafe-inline'; default-src 'none'")
                    .replace("</body>", probe), encoding="utf-8")  # fmt: skip
    dom, said = browse(copy, tmp_path / "profile", "--dump-dom")
    sizes = re.search(r'data-sizes="([\d,]*)"', dom)
    assert sizes is not None
    areas = [int(part) for part in sizes[1].split(",")]
    assert len(areas) == seen.tags.count("img") == 10
    assert min(areas) >= 20 * 20
    height = re.search(r'data-height="(\d+)"', dom)
    assert height is not None
    assert int(height[1]) > 1000
    assert "CONSOLE" not in said, said
    assert "ERR_" not in said, said
    _, said = browse(out, tmp_path / "profile2", f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1200,1600")
    assert "CONSOLE" not in said
    from PIL import Image

    with Image.open(tmp_path / "shot.png") as shot:
        pixels = np.asarray(shot.convert("RGB")).astype(int)
    assert (pixels.sum(-1) > 720).mean() > 0.5  # dark on light
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    bad = tmp_path / "bad.html"  # the console is really listened to
    bad.write_text(text.replace("<body>", '<body><img src="http://127.0.0.1:9/x.png">'), encoding="utf-8")
    assert "CONSOLE" in browse(bad, tmp_path / "profile3", "--dump-dom")[1]

"""The report of a run: its numbers against the lines it was made from, and the page in a browser."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jax_wideep.report import write_report
from jax_wideep.report.__main__ import main

LAYERS, EXPERTS, RANKS, STEPS = 2, 8, 4, 60
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    lines = [
        {"run": {"num_experts": EXPERTS, "top_k": 2, "note": "</script> <b>"}},
        {"step": 0, "held_out_loss": 5.5},
    ]
    for step in range(1, STEPS + 1):
        layers = []
        for layer in range(LAYERS):
            counts = rng.multinomial(500, rng.dirichlet(np.full(EXPERTS, 0.3 + step / 20)))
            layers.append(
                {
                    "tokens_per_expert": counts.tolist(),
                    "rows_per_rank": counts.reshape(RANKS, -1).sum(axis=1).tolist(),
                    "dropped": step % 3,
                    "spilled": layer,
                }
            )
        lines.append({"step": step, "loss": 5.0 / step, "tokens_per_s": 100.0 + step, "layers": layers})
    lines[30] |= {"held_out_loss": 0.25, "replaced": True}
    lines.append({"exchange": [{"name": "dispatch + combine", "ms": 3.0, "floor_ms": 2.0}]})
    return lines


@pytest.fixture
def run(tmp_path, records):
    folder = tmp_path / "a run & more"
    folder.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"step": 61, "lo')  # cut off while it was written
    return folder


def embedded(page):
    (text,) = re.findall(
        r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL
    )
    return json.loads(text)


def test_the_page_holds_the_numbers_of_the_run(run, records):
    data = embedded(write_report(run))
    steps = [record for record in records if "loss" in record]
    assert data["run"] == records[0]["run"]
    assert data["steps"] == list(range(1, STEPS + 1))
    assert data["loss"] == [record["loss"] for record in steps]
    assert data["tokens_per_s"] == [record["tokens_per_s"] for record in steps]
    assert data["held_out"] == [[0, 5.5], [29, 0.25]]
    assert data["replaced"] == [29]
    assert data["dropped"] == [LAYERS * (step % 3) for step in range(1, STEPS + 1)]
    assert data["spilled"] == [1] * STEPS
    assert data["exchange"] == records[-1]["exchange"]
    worst, mean = data["imbalance"]["worst layer"], data["imbalance"]["mean of layers"]
    for at, record in enumerate(steps):
        ratios = [max(layer["rows_per_rank"]) / (500 / RANKS) for layer in record["layers"]]
        assert worst[at] == pytest.approx(max(ratios), abs=1e-4)
        assert mean[at] == pytest.approx(sum(ratios) / LAYERS, abs=1e-4)
    for key, name, members in (("heat", "tokens_per_expert", EXPERTS), ("rank_heat", "rows_per_rank", RANKS)):
        assert data[f"{key}_edges"] == list(range(STEPS + 1))
        for layer in range(LAYERS):
            cells = np.frombuffer(base64.b64decode(data[key][layer]), np.uint8).reshape(STEPS, members)
            got = (cells / 255.0) ** 2 * data[f"{key}_top"]
            counts = np.array([record["layers"][layer][name] for record in steps])
            want = np.minimum(counts / (500 / members), data[f"{key}_top"])
            # Half a byte either way.
            np.testing.assert_allclose(
                np.sqrt(got), np.sqrt(want), atol=0.51 / 255 * np.sqrt(data[f"{key}_top"])
            )


def test_long_runs_are_averaged_over_steps(run, records, monkeypatch):
    monkeypatch.setattr("jax_wideep.report.data._MOST_BINS", 7)
    data = embedded(write_report(run))
    edges = data["heat_edges"]
    assert len(edges) == 8 and edges[0] == 0 and edges[-1] == STEPS
    steps = [record for record in records if "loss" in record]
    counts = np.array([record["layers"][1]["tokens_per_expert"] for record in steps]) / (500 / EXPERTS)
    cells = np.frombuffer(base64.b64decode(data["heat"][1]), np.uint8).reshape(7, EXPERTS)
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        want = np.sqrt(np.minimum(counts[start:end].mean(axis=0) / data["heat_top"], 1)) * 255
        np.testing.assert_allclose(cells[number], want, atol=0.51)


def test_a_run_without_layers_has_a_report(run):
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    data = embedded(write_report(run))
    assert data["loss"] == [2.0, 1.0] and "heat" not in data


def test_the_page_asks_for_nothing(run):
    text = write_report(run).read_text()
    assert not re.search(r"https?:|\bsrc=|@import|url\(|fetch\(|XMLHttp", text)
    assert "a run &amp; more" in text


def test_command_line(run, tmp_path, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main([str(run), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").read_text() == (run / "report.html").read_text()
    assert main([str(tmp_path)]) == 2
    assert "expected a folder with metrics.jsonl" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"run": {}}\n')
    assert main([str(run)]) == 2
    assert "expected steps with a loss" in capsys.readouterr().err


# Without a screen nothing asks for frames, and scrolling sends no event.
TIMER_FOR_FRAMES = "<script>requestAnimationFrame = draw => setTimeout(draw, 0);</script>"
# Shows the page in a frame of a given width, uses it, and writes down what it sees.
HARNESS = """<!doctype html><body><iframe id="frame" style="width:%(width)dpx;height:900px;border:0"></iframe>
<script>
const frame = document.getElementById("frame");
const settle = () => new Promise(done => setTimeout(done, 300));
const painted = canvas => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
};
frame.onload = async () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  await settle();
  for (const canvas of page.querySelectorAll("canvas")) {
    canvas.scrollIntoView();
    view.dispatchEvent(new view.Event("scroll"));
    await settle();
  }
  const seen = {
    ready: page.body.dataset.ready, width: page.documentElement.scrollWidth,
    charts: [...page.querySelectorAll("[data-chart]")].map(card => card.dataset.chart),
    colours: [...page.querySelectorAll(".card canvas")].map(painted),
    columns: view.getComputedStyle(page.getElementById("charts")).gridTemplateColumns.split(" ").length,
    tiles: [...page.querySelectorAll(".tile")].map(tile => tile.textContent),
    whole: page.getElementById("range").textContent,
  };
  const chart = page.querySelector("[data-chart] canvas");
  chart.dispatchEvent(new view.WheelEvent("wheel", {deltaY: -600, cancelable: true, clientX: 150, clientY: 10}));
  await settle();
  seen.zoomed = page.getElementById("range").textContent;
  page.getElementById("all").click();
  const layer = page.getElementById("layer");
  layer.value = "1";
  layer.dispatchEvent(new view.Event("change"));
  await settle();
  seen.reset = page.getElementById("range").textContent;
  seen.layers = [...page.querySelectorAll("[data-layer]")].map(card => card.dataset.layer);
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
};
frame.srcdoc = %(page)s;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "columns"), [(1200, 2), (390, 1)], ids=["desktop", "phone"])
def test_the_page_in_a_browser(run, tmp_path, width, columns):
    page = write_report(run).read_text().replace("</head>", TIMER_FOR_FRAMES + "</head>")
    page = json.dumps(page).replace("<", "\\u003c")
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS % {"width": width, "page": page})
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000"]
    command += [
        f"--user-data-dir={tmp_path}/profile",
        "--virtual-time-budget=30000",
        "--dump-dom",
        harness.as_uri(),
    ]
    browser = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', browser.stdout, re.DOTALL)
    assert found, browser.stderr[-2000:]
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["ready"] == "yes"
    assert seen["width"] <= width  # nothing sticks out
    assert seen["columns"] == columns
    assert [title.split(",")[0].split(":")[0] for title in seen["charts"]] == [
        "Loss", "Tokens a second", "Imbalance of ranks", "Selections dropped and spilled",
    ]  # fmt: skip
    assert len(seen["colours"]) == 4 + 2 * LAYERS and min(seen["colours"]) > 10  # every canvas is drawn on
    assert f"{5.0 / STEPS:.3g}loss at the end" in seen["tiles"]
    assert seen["whole"] == seen["reset"] == f"steps 0 – {STEPS}"
    assert seen["zoomed"] != seen["whole"]
    assert seen["layers"] == ["1"]


def test_importing_the_report_starts_no_backend(tmp_path):
    code = "import jax_wideep.report, jax_wideep._ffi as f; assert not f.backend_started()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)

"""The HTML report, as a file and as a browser shows it (Chromium, headless, without a network)."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import NETWORKS
from PIL import Image

import fastscore
from fastscore import Scores
from fastscore.cli import report as html_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH (Debian: chromium)")
RESIDUAL = NETWORKS["residual"]
ACT = """<script>{
for (const press of PRESSES) document.querySelectorAll("#scores th button")[press].click();
const slider = document.getElementById("fraction");
if (UNIT !== null) document.getElementById("unit").value = UNIT;
if (FRACTION !== null) { slider.value = FRACTION; slider.dispatchEvent(new Event("input")); }
const box = document.getElementById("search");
box.value = SEARCH;
const toggle = document.getElementById("stages");
if (GROUPED !== null) { toggle.checked = GROUPED; toggle.dispatchEvent(new Event("input")); }
for (const stage of OPEN) document.querySelectorAll("#scores .stage button")[stage].click();
box.dispatchEvent(new Event("input"));
}</script></html>"""


@pytest.fixture(scope="module")
def scores() -> Scores:
    return fastscore.score(RESIDUAL.traced(), [RESIDUAL.inputs(8)], progress=False)


def data(path: Path) -> dict:
    """What the page holds."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)[1])


def browse(*arguments: str) -> str:
    """Run the browser; what it prints."""
    return subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *arguments], capture_output=True,
                          text=True, check=True, timeout=120).stdout


def shown(path: Path, presses: list[int] = (), fraction: int | None = None, unit: str | None = None,
          search: str = "", grouped: bool | None = None, opened: list[int] = ()) -> str:
    """The page as the browser has made it, after clicks on headings and stages, a budget and a search."""
    acted, act = path.with_suffix(".acted.html"), ACT
    for name, value in (("PRESSES", list(presses)), ("FRACTION", fraction), ("UNIT", unit), ("SEARCH", search),
                        ("GROUPED", grouped), ("OPEN", list(opened))):
        act = act.replace(name, json.dumps(value))
    acted.write_text(path.read_text().replace("</html>", act))
    return browse("--dump-dom", f"file://{acted}")


def rows(page: str, table: str) -> list[list[str]]:
    """The text of each cell of a table's body."""
    body = re.search(rf'<table id="{table}".*?<tbody>(.*?)</tbody>', page, re.S)[1]
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", row, re.S)]
            for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.S)]


def test_the_file_holds_every_score_and_asks_nobody_for_anything(scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    html_report.write(scores, path, title="mine", fraction=0.25)
    held = data(path)
    assert [layer["name"] for layer in held["layers"]] == list(scores)
    for layer in held["layers"]:
        assert torch.equal(torch.tensor(layer["values"]), scores[layer["name"]])
    assert (held["title"], held["fraction"]) == ("mine", 0.25)
    assert dict(held["facts"])["samples"] == "8"
    text = path.read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=|url\(|@import|fetch\(""", text.replace("default-src", ""))
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xhtml", "") \
        .replace("http-equiv", "")


def test_bad_input(scores: Scores, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fraction: 1"):
        html_report.write(scores, tmp_path / "r.html", fraction=1)
    with pytest.raises(FileNotFoundError, match="make it first"):
        html_report.write(scores, tmp_path / "nowhere" / "r.html")
    assert list(tmp_path.iterdir()) == []


@needs_browser
def test_the_browser_shows_what_a_mask_would_remove(scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    html_report.write(scores, path, fraction=0.25)
    x = RESIDUAL.inputs(2)
    for fraction in (0.25, 0.6):
        with fastscore.mask(RESIDUAL.traced(), scores, fraction, x) as removed:
            expected = {layer: len(removed.get(layer, ())) for layer in scores}
        page = shown(path, fraction=None if fraction == 0.25 else round(100 * fraction))
        table = rows(page, "scores")
        assert [row[0] for row in table] == list(scores)
        assert {row[0]: int(row[2].split(" ")[0]) for row in table} == expected
        assert f"{sum(expected.values())} channels, with importances" in page
    for row in table:
        values = scores[row[0]].sort().values
        middle = len(values) // 2
        median = values[middle] if len(values) % 2 else values[middle - 1:middle + 1].mean()
        assert [int(row[1]), *map(float, row[3:6])] == pytest.approx(
            [len(values), *(float(v) for v in (values[0], median, values[-1]))], rel=6e-3)


@needs_browser
def test_headings_sort(scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    html_report.write(scores, path)
    for presses, reverse in (([5], True), ([5, 5], False)):
        page = shown(path, presses)
        most = [float(row[5]) for row in rows(page, "scores")]
        assert most == sorted(most, reverse=reverse)
        assert ("descending" if reverse else "ascending") in page
    names = [row[0] for row in rows(shown(path, [0]), "scores")]
    assert names == sorted(names)


def test_the_page_says_what_can_go(scores: Scores, tmp_path: Path) -> None:
    html_report.write(scores, tmp_path / "r.html")
    line, *_ = scores.coverage.lines()
    assert f'["coverage", "{line.removeprefix("coverage: ")}; outputs that stay: ' in (tmp_path / "r.html").read_text()


@needs_browser
def test_names_are_text_whatever_they_hold(tmp_path: Path) -> None:
    name = """</script><script>document.title="taken"</script><img src=x onerror=alert(1)>&quot;"""
    whole = fastscore.score(RESIDUAL.traced(), [RESIDUAL.inputs(2)], progress=False)
    evil = Scores({name: torch.arange(1.0, 6.0, dtype=torch.float64)}, whole.origin, skipped={name: "<b>bold</b>"})
    path = tmp_path / "r.html"
    html_report.write(evil, path, title=name)
    page = shown(path)
    assert rows(page, "scores")[0][0] == name
    assert rows(page, "reasons")[0] == [name, "<b>bold</b>"]
    assert "<img" not in page
    assert f"<title>{html.escape(name, quote=False)}</title>" in page


@needs_browser
def test_a_picture(scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    html_report.write(scores, path)
    browse("--window-size=900,900", f"--screenshot={tmp_path / 'r.png'}", f"file://{path}")
    with Image.open(tmp_path / "r.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {(0x0b, 0x6e, 0x99), (0xd9, 0x73, 0x0d)} <= colours  # what stays, and what goes


@needs_browser
@pytest.mark.parametrize("unit", ["macs", "params", "channels"])
def test_a_budget_removes_what_prune_removes(unit: str, scores: Scores, tmp_path: Path) -> None:
    path, model, x = tmp_path / "r.html", RESIDUAL.traced(), RESIDUAL.inputs(2)
    costs = html_report.removal_costs(model, scores, x)
    left = costs[unit]["remains"][unit]
    for step in (1, len(left) // 2, len(left) - 1):  # budgets that steps meet to the unit: prune() gives none back
        report = fastscore.prune(model, scores, x, **{unit: left[step] / left[0]}).report
        assert {name: getattr(report, name)[1] for name in ("macs", "params", "channels")} == \
            {name: values[step] for name, values in costs[unit]["remains"].items()}
    html_report.write(scores, path, costs=costs, command="fastscore prune nets.py:build --scores 's s'")
    page = shown(path, fraction=60, unit=unit)
    count = next(i for i, value in enumerate(left) if value <= 0.6 * left[0])
    expected = dict.fromkeys(scores, 0)
    for layer, channels in costs[unit]["order"][:count]:
        expected[list(scores)[layer]] += len(channels)
    assert {row[0]: int(row[2].split(" ")[0]) for row in rows(page, "scores")} == expected
    assert f"{100 * left[count] / left[0]:.1f} % of the " in page
    assert f"fastscore prune nets.py:build --scores 's s' --{unit} 0.6 --out small.onnx</pre>" in page


@needs_browser
def test_a_search_shows_the_layers_that_hold_it(scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    html_report.write(scores, path)
    for text in ("BLOCK1", "conv2", "nothing like this"):
        assert [row[0] for row in rows(shown(path, search=text), "scores")] == \
            [layer for layer in scores if text.lower() in layer]


@needs_browser
def test_layers_stand_by_stage(scores: Scores, tmp_path: Path) -> None:
    """By hand, of 150 layers by themselves; a stage sums up its layers, and opens."""
    path = tmp_path / "r.html"
    layers = [f"layer{i // 15}.{i % 15}.conv" for i in range(150)]
    totals = {name: torch.rand(6, generator=torch.Generator().manual_seed(i)).double() for i, name in enumerate(layers)}
    many = Scores(totals, scores.origin)
    html_report.write(many, path)
    closed = rows(shown(path), "scores")
    assert [row[0] for row in closed] == [f"▸ layer{i} (15)" for i in range(10)]
    flat = rows(shown(path, grouped=False), "scores")
    assert [row[0] for row in flat] == layers
    for stage, row in enumerate(closed):
        values = torch.cat([many[layer] for layer in layers[15 * stage:15 * stage + 15]])
        assert [int(row[1]), int(row[2].split()[0])] == [90, sum(int(each[2].split()[0]) for each in flat
                                                                  if each[0].startswith(f"layer{stage}."))]
        assert [float(cell) for cell in row[3:6]] == pytest.approx(
            [float(values.min()), float(values.quantile(0.5)), float(values.max())], rel=6e-3)
    opened = rows(shown(path, opened=[1]), "scores")
    assert [row[0] for row in opened][:18] == ["▸ layer0 (15)", "▾ layer1 (15)", *layers[15:30], "▸ layer2 (15)"]
    searched = rows(shown(path, search="layer3.7"), "scores")
    assert [row[0] for row in searched] == ["▾ layer3 (15)", "layer3.7.conv"]
    sorted_by_most = rows(shown(path, presses=[5], opened=[0]), "scores")
    stages = [float(row[5]) for row in sorted_by_most if row[0][0] in "▸▾"]
    inner = [float(row[5]) for row in sorted_by_most[1:16]]
    assert (stages, inner) == (sorted(stages, reverse=True), sorted(inner, reverse=True))


@needs_browser
def test_measured_agreement_stands_beside_the_budget(scores: Scores, tmp_path: Path) -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(32)
    kept = replace(scores, notes={"model": "nets.py:build", "date": "today"})
    kept.save(tmp_path / "s.safetensors")
    curve = fastscore.curve(model, kept, [x], (1.0, 0.7, 0.5), progress=False)
    file, path = tmp_path / "curve.json", tmp_path / "r.html"
    written = {"resource": "macs", "decisions": curve.decisions, "note": curve.note, "notes": dict(kept.notes),
               "rows": curve.records()}
    file.write_text(json.dumps(written))
    html_report.write(kept, path, costs=html_report.removal_costs(model, kept, x[:2]),
                      curve=html_report.read_curve(str(file), kept))

    def said(row: int) -> str:
        return f"{curve.rows[row].repaired.agreement:.1%} at {curve.rows[row].macs:.1%} of the MACs".replace("%", " %")

    page = shown(path, fraction=70, unit="macs")
    assert f"judged by {curve.decisions} decisions about samples that no repair has seen: the true share" in page
    assert f"measured: {said(2)}, {said(1)}<" in page  # steps are wide here: 59 % is what 70 % leaves
    assert [row[5] for row in rows(page, "curve")] == [f"{row.repaired.agreement:.1%}".replace("%", " %")
                                                       for row in curve.rows]
    assert f"measured: {said(0)}<" in shown(path, fraction=100, unit="macs")
    assert "agreement was measured for budgets in MACs<" in shown(path, fraction=80, unit="params")
    for broken, named in (({**written, "notes": {"model": "nets.py:build", "date": "yesterday"}}, "other scores, whose "
                           "date is yesterday and not today"), ({"rows": []}, r"not what fastscore curve --out writes"),
                          ({**written, "resource": "hours"}, "not what"), ({**written, "decisions": 0}, "not what")):
        file.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=named):
            html_report.read_curve(str(file), kept)
    with pytest.raises(FileNotFoundError, match=r"curve: there is no file no\.json"):
        html_report.read_curve("no.json", kept)


@needs_browser
@pytest.mark.parametrize("width", [420, 1200])
def test_a_narrow_window_holds_all_of_it(width: int, scores: Scores, tmp_path: Path) -> None:
    """150 layers with long names, long notes: nothing stands out on the right."""
    names = [f"backbone.stages.{i // 30}.blocks.{i % 30}.depthwise_separable.conv" for i in range(150)]
    totals = {name: torch.rand(64, generator=torch.Generator().manual_seed(i)).double() for i, name in enumerate(names)}
    many = Scores(totals, scores.origin, skipped={f"{names[0]}.head": "its channels meet a parameter of the model's"},
                  notes={"model": "/a/long/path/without/any/space/" * 6, "checkpoint": "0123456789abcdef" * 6})
    path, frame = tmp_path / "r.html", tmp_path / "frame.html"
    row = {"budget": 0.7, "macs": 0.7, "params": 0.71, "channels": 0.72, "cut_agreement": 0.9,
           "repaired_agreement": 1.0}
    curve = {"resource": "channels", "decisions": 10, "note": "ranked", "rows": [row] * 4}
    html_report.write(many, path, curve=curve, command="fastscore prune /a/long/path --scores " + "x" * 90)
    frame.write_text(f'''<iframe width="{width}" height="800" srcdoc="{html.escape(path.read_text())}"></iframe><script>
        addEventListener("load", () => {{ const page = frames[0].document.documentElement;
        page.querySelectorAll(".stage button").forEach((_, i) => page.querySelectorAll(".stage button")[i].click());
        const cells = page.querySelectorAll("td").length, right = part => part.getBoundingClientRect().right;
        const cut = [...page.querySelectorAll("svg rect")].filter(bar => right(bar) > right(bar.ownerSVGElement) + .5);
        document.title = `${{page.clientWidth}} ${{page.scrollWidth}} ${{cells}} ${{cut.length}}`; }});
        </script>''')
    told = re.search("<title>(.*?)</title>", browse("--dump-dom", f"file://{frame}"))[1]
    seen, reach, cells, bars_cut_off = map(int, told.split())
    assert cells > 150 * 8
    assert width - 30 < seen <= width
    assert reach <= seen
    assert bars_cut_off == 0


@needs_browser
@pytest.mark.parametrize("images", [" --images photos", ""])
def test_that_prune_measures_is_said_where_it_does(images: str, scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    html_report.write(scores, path, command=f"fastscore prune nets.py:build --scores s{images}")
    hidden = re.search(r'id="measuring"([^>]*)>', shown(path))[1]
    assert ("hidden" in hidden) is not bool(images)

"""The report: what it holds, and that a real browser shows it without a fault or a request.

The browser is Chromium; where there is none those tests are skipped (Debian: apt install chromium).
"""

import json
import math
import re

import browser
import cases
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import write_record

from fsn_jax.readings import LayerState
from train.analysis import final_losses, report
from train.analysis.copy_depth import BUCKETS, FAR, tabulate
from train.analysis.heads import measure_attention, rounded
from train.analysis.readings import read_layer
from train.analysis.records import read_arms
from train.data.suffix_match import match_suffixes
from train.errors import UserError

SAMPLE = "</script><script>document.title = 'broken out'</script> <b>bold</b> &amp; <!-- é"


def depth_result():
    """What copy_depth writes, of made-up losses."""
    rng = np.random.default_rng(0)
    match = match_suffixes(rng.integers(2, size=(12, 100)).astype(np.uint8))
    losses = {name: [rng.random(match.depth.shape)] for name in ("fsn", "transformer")}
    arms = tabulate(match, losses, reference="transformer", num_resamples=20)
    return {
        "kind": "copy_depth", "reference": "transformer", "windows": 12, "length": 99, "far": FAR,
        "level": 0.95, "arms": arms,
    }  # fmt: skip


def readings_result():
    """What readings writes, of made-up states of two layers."""
    theta = cases.angles(1, 5, 4)
    state = LayerState(theta, theta, theta, cases.random_attention(1, 2, 5), jnp.ones((2, 1, 2, 4)))
    kappa = state.kappa * (0.3 - 0.2j)
    layer = read_layer(state._replace(kappa=kappa), jnp.array([[0, 1, 2, 0, 1]]))
    return {
        "kind": "readings", "run": "fsn", "step": 20, "windows": 1, "length": 5,
        "layers": [layer, layer],
    }  # fmt: skip


def heads_result():
    """What heads writes, of made-up attention of two layers."""
    layer = rounded(
        measure_attention(cases.random_attention(1, 2, 5), jnp.array([[0, 1, 2, 0, 1]]))
    )
    run = {
        "name": "fsn",
        "run": "fsn_seed1",
        "heads": ["head 1", "head 2"],
        "layers": [layer, layer],
    }
    return {
        "kind": "heads", "windows": 1, "length": 5, "runs": [run],
        "even_attention": dict.fromkeys(layer["attention_to"], 0.2),
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of two arms, one of them with two seeds, and of every kind of analysis."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        write_record(folder, "fsn", curve=(3.0, 2.4, 2.0), whole=2.1, sample=SAMPLE),
        write_record(folder, "fsn", seed=1, curve=(3.2, 2.6, 2.2), whole=2.3),
        write_record(folder, "transformer", curve=(3.1, 2.7, 2.5)),
    ]
    for size in (10**3, 10**4, 10**5):
        for kind in ("fsn", "transformer"):
            write_record(
                folder / "rungs", f"{kind}_{size}", parameters=size, curve=(9 / size**0.1,)
            )
    rungs = sorted((folder / "rungs").iterdir())
    results = {
        "depth": depth_result(),
        "ladder": final_losses.result(rungs),
        "variants": final_losses.result(runs),
        "heads": heads_result(),
        "readings": readings_result(),
    }
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    added = [str(folder / f"{name}.json") for name in results]
    page = folder / "report.html"
    title = "A <title> & more"
    report.program(
        ["report", *map(str, runs), "--add", *added, f"--output={page}", f"--title={title}"]
    )
    return page


def test_it_names_no_address_and_leaves_no_blank(made):
    text = made.read_text(encoding="utf-8")
    assert "{{" not in text
    addresses = set(re.findall(r"\w+://[^\s\"'<)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name of SVG, not a place


def test_its_data_are_those_of_the_records(made):
    (content,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>',
        made.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    data = json.loads(content)
    fsn, transformer = data["arms"]
    assert fsn["seeds"] == [0, 1] and transformer["seeds"] == [0]
    assert fsn["bpc"] == pytest.approx(2.1) and fsn["deviation"] == pytest.approx(0.02**0.5)
    assert fsn["whole_split"] == pytest.approx(2.2) and transformer["whole_split"] is None
    # Characters, losses, FLOPs, and seconds: three rows of 5 s for one seed, of 6 s for the other.
    flops = pytest.approx(6e3 * 999999)
    assert fsn["validation"][-1] == [999999, pytest.approx(2.1), 2.0, 2.2, flops, 16.5]
    assert fsn["validation"][0][-1] == 5.5
    assert fsn["sample"] == SAMPLE
    assert [run["commit"] for run in data["runs"]] == ["c0ffee"] * 3
    assert len(data["copy_depth"]) == len(data["heads"]) == len(data["readings"]) == 1
    assert [found["variants"] for found in data["final_losses"]] == [False, True]


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path):
    curve = [3 - i / 1000 for i in range(1000)]
    (arm,) = read_arms([write_record(tmp_path, "long", curve=curve)]).values()
    thinned = report.points(arm, "train")
    assert len(thinned) <= report.MOST_POINTS and thinned[-1][1] == pytest.approx(curve[-1])


def test_what_is_no_number_does_not_blank_the_page(tmp_path):
    diverged = write_record(tmp_path, "diverged", curve=(3.0, math.nan))
    data = report.page_data([write_record(tmp_path, "one"), diverged], [])
    assert data["range"] == [pytest.approx(1.95), pytest.approx(3.05)]
    page = report.render(data | {"copy_depth": [{"loss": math.inf}]}, "title")
    assert "NaN" not in page.split('id="data">')[1].split("</script>")[0]
    assert '"copy_depth":[{"loss":null}]' in page


def test_an_unfinished_run_has_a_page_too(tmp_path):
    folder = write_record(tmp_path, "early", curve=(3.0,))
    for name in ("summary.json", "sample.txt", "metrics.jsonl", "timing.jsonl"):
        (folder / name).unlink()
    report.program(["report", str(folder), f"--output={tmp_path / 'r.html'}"])
    assert '"bpc":null' in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_mistakes_are_one_line(tmp_path):
    run = str(write_record(tmp_path, "one"))
    with pytest.raises(UserError, match="must be a file whose name ends in .html"):
        report.program(["report", run, "--output=r.pdf"])
    with pytest.raises(UserError, match=r"--add=.*config.json was not written by"):
        report.program(["report", run, "--add", f"{run}/config.json"])
    with pytest.raises(UserError, match=r"--add=nothing cannot be read"):
        report.program(["report", run, "--add", "nothing"])


needs_browser = pytest.mark.skipif(not browser.find(), reason="there is no Chromium here")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def lines(tab, section):
    """How many curves the charts of a section show."""
    return tab.run(f"document.querySelectorAll('#{section} path.series').length")


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_every_chart_is_drawn_without_fault_request_or_overflow(made, tab, width, height, dark):
    tab.errors.clear()
    tab.requests.clear()
    tab.open(made, width=width, height=height, dark=dark)
    assert tab.errors == []
    assert set(tab.requests) == {made.resolve().as_uri()}
    assert tab.run("document.title") == "A <title> & more"
    assert tab.run("document.documentElement.scrollWidth") <= width
    charts = tab.run("[...document.querySelectorAll('.plot > svg')].map(s => s.ariaLabel)")
    assert len(charts) == 12 and all(charts)
    assert lines(tab, "loss-curves") == 2 and lines(tab, "scale-ladder") == 4
    assert lines(tab, "copy-depth") == 1 and lines(tab, "heads-fsn_seed1") == 6
    beside = "[...document.querySelectorAll('#final-losses-beside-fsn tbody tr')].map"
    assert tab.run(f"{beside}(row => row.cells[4].textContent)") == ["", "+0.400"]
    assert tab.run(f"{beside}(row => row.querySelectorAll('.dots circle').length)") == [3, 2]
    assert tab.run("document.querySelectorAll('.roses svg').length") == 3
    assert tab.run("document.querySelector('#samples pre').textContent") == SAMPLE
    # What is drawn lies within its picture: no NaN, nothing infinite.
    shapes = tab.run("[...document.querySelectorAll('svg *')].map(e => e.outerHTML).join()")
    assert not re.search(r"NaN|Infinity|undefined", shapes)
    assert contrast(tab, "body") >= 7 and contrast(tab, ".note") >= 4.5


def contrast(tab, selector):
    """Contrast of an element's text to the page, as WCAG defines it."""
    colors = tab.run(
        f"[getComputedStyle(document.querySelector({selector!r})).color,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    light = []
    for color in colors:
        channels = np.array([int(v) for v in re.findall(r"\d+", color)[:3]]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


@needs_browser
def test_an_arm_can_be_hidden_and_shown_again(made, tab):
    tab.open(made, width=1280, height=900)
    button = "document.querySelector('[data-arm=fsn]')"
    for shown in (False, True):
        tab.run(f"{button}.click()")
        tab.settle()
        assert tab.run(f"{button}.getAttribute('aria-pressed')") == str(shown).lower()
        assert lines(tab, "loss-curves") == 1 + shown
        assert lines(tab, "copy-depth") == int(shown)  # the reference has no difference to itself
    assert tab.errors == []


@needs_browser
def test_pointing_at_a_chart_tells_its_values(made, tab):
    tab.open(made, width=1280, height=900)
    box = tab.run(
        "(b => [b.left, b.top, b.right, b.bottom])"
        "(document.querySelector('#loss-curves svg').getBoundingClientRect())"
    )
    tip = "document.querySelector('#loss-curves .tip')"
    assert tab.run(f"{tip}.hidden")
    tab.move(box[2] - 15, (box[1] + box[3]) / 2)
    assert not tab.run(f"{tip}.hidden")
    tooltip = tab.run(f"{tip}.innerText")
    assert "fsn: 2.1000 (2.000 to 2.200)" in tooltip and "transformer: 2.5000" in tooltip
    tab.move(5, 5)
    assert tab.run(f"{tip}.hidden")


@needs_browser
def test_choices_change_what_is_drawn(made, tab):
    tab.open(made, width=1280, height=900)
    path = "document.querySelector('#readings-fsn path.series').getAttribute('d')"

    def choose(section, index, value):
        tab.run(
            f"(s => {{ s.value = {value!r}; s.onchange(); }})"
            f"(document.querySelectorAll('#{section} select')[{index}])"
        )
        tab.settle()

    choose("copy-depth", 1, "loss")
    assert lines(tab, "copy-depth") == 2
    ticks = tab.run(
        "[...document.querySelectorAll('#copy-depth svg text')].map(t => t.textContent)"
    )
    assert set(BUCKETS) <= set(ticks)
    before = tab.run("document.querySelector('#loss-curves path.series').getAttribute('d')")
    choose("loss-curves", 2, "log")
    assert tab.run("document.querySelector('#loss-curves path.series').getAttribute('d')") != before
    for by, label in (("4", "training FLOPs"), ("5", "seconds of training"), ("0", "characters")):
        choose("loss-curves", 1, by)
        assert lines(tab, "loss-curves") == 2
        assert label in tab.run("document.querySelector('#loss-curves svg').ariaLabel")
    choose("loss-curves", 0, "train")
    assert lines(tab, "loss-curves") == 2
    assert tab.run(path)
    choose("readings-fsn", 0, "1")
    assert tab.run("document.querySelectorAll('.roses svg').length") == 3
    assert tab.errors == []

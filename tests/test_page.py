"""The page, report.html: its parts, the order of its sections, what a hostile file may put on it.

    python -m pytest tests/test_page.py -v
"""

import html
import importlib
import json
import math
import re
import shutil
import subprocess
import sys

import lungaug
from lungaug import Figure, Heading, Refusal, Table, Text

import numpy as np
import pytest

import evaluate
from helpers import small_run


def leave_pages(run, items):
    """Let each stage of a run leave these items as its page."""
    as_json = [{"kind": type(item).__name__.lower(), **item._asdict()} for item in items]
    for name in evaluate.PAGE_FOLDERS:
        lungaug.write(run / name / "options.json", {"page": as_json})


def test_table_html__cells_are_escaped():
    """A cell or a caption with mark-up is text; a line end or a terminal code is escaped."""
    table = evaluate.table_html("<b>", ("<i>",), [("<script>\n\x1b",), (1.5,)])
    assert "<table><thead><tr><th>&lt;i&gt;</th></tr></thead><tbody><tr><td>&lt;script&gt;\\n\\x1b</td></tr>" in table
    assert "<tr><td>1.5</td></tr>" in table and "&lt;b&gt;" in table and "<b>" not in table


def test_table_html__a_number_never_breaks_and_a_sentence_may():
    """Only a long text with spaces has the class whose cells break; a marked row has its own."""
    table = evaluate.table_html("A", ("a", "b"), [("1,234,567.890 ± 0.123", "word " * 20)], marked=(0,))
    assert "<td>1,234,567.890 ± 0.123</td>" in table and '<td class="long">word' in table
    assert '<tr class="changed">' in table


def as_item(item):
    """An item of a page as options.json holds it."""
    return {"kind": type(item).__name__.lower(), **item._asdict()}


def test_figure_html__inline_or_said_to_be_missing(tmp_path):
    """A picture's bytes stand in the page; where there is none the caption says so, escaped."""
    lungaug.write(tmp_path / "a.png", b"\x89PNG")
    assert "data:image/png;base64,iVBORw==" in evaluate.figure_html(tmp_path / "a.png", as_item(Figure("A", "a.png")))
    missing = evaluate.figure_html(tmp_path / "b.png", as_item(Figure("<B>", "b.png")))
    assert "&lt;B&gt;" in missing and "<B>" not in missing and "img" not in missing


def test_figure_html__of_an_older_run_needs_no_names(tmp_path):
    """A page that an older version left, with caption and file alone, is drawn."""
    lungaug.write(tmp_path / "a.png", lungaug.png(np.zeros((2, 3), np.uint8)))
    drawn = evaluate.figure_html(tmp_path / "a.png", {"kind": "figure", "caption": "A", "file": "a.png"})
    assert 'width="3" height="2"' in drawn and 'alt="A"' in drawn


def test_figure_html__names_scale_and_code_are_beside_the_picture(tmp_path):
    """Each row and column has its name, escaped; 80 pixels of half a millimetre get a bar of 5 mm, an eighth."""
    lungaug.write(tmp_path / "a.png", lungaug.png(np.zeros((20, 80), np.uint8)))
    item = as_item(Figure("Figure 2. Cubes, all", "a.png", ("evaluate.slices",), ("<r>",), ("c", "d"), 0.5))
    drawn = evaluate.figure_html(tmp_path / "a.png", item)
    assert '<div class="rows"><span>&lt;r&gt;</span></div>' in drawn
    assert '<div class="columns"><span>c</span><span>d</span></div>' in drawn
    assert 'style="width:12.50%"></span>5 mm' in drawn
    assert "<code>evaluate.slices</code>" in drawn and 'alt="Cubes, all"' in drawn


def test_figure_html__a_slider_counts_the_rows(tmp_path):
    """A figure with `first` has a slider over its rows, which begins there, or at the last where it lies beyond."""
    lungaug.write(tmp_path / "a.png", lungaug.png(np.zeros((6, 4), np.uint8)))
    for first, shown in ((1, 1), (9, 2), (-1, 0)):
        item = as_item(Figure("A", "a.png", rows=("x", "y", "z"), first=first))
        drawn = evaluate.figure_html(tmp_path / "a.png", item)
        assert f'data-first="{shown}"' in drawn and f'max="2" value="{shown}"' in drawn


def test_charts_html__a_drawing_that_is_none_is_one_line(tmp_path):
    """An SVG cut short is a Refusal that names it."""
    lungaug.write(tmp_path / "figure_7.svg", "<svg><g")
    with pytest.raises(Refusal, match="figure_7.svg"):
        evaluate.figure_html(tmp_path / "figure_7.svg", as_item(Figure("A", "figure_7.svg")))


def test_item_html__reads_no_file_outside_the_stages_folder(tmp_path):
    """A figure's file is looked for in the stage's own folder, whatever path options.json gives."""
    lungaug.write(tmp_path / "secret.png", b"secret")
    (tmp_path / "gan").mkdir()
    item = {"kind": "figure", "caption": "A", "file": "../secret.png"}
    assert "Not made in this run" in evaluate.item_html(item, tmp_path / "gan")


def test_draw_report__what_no_encoding_holds_can_be_written(tmp_path):
    """A heading, a caption or a line may hold half a character: it is written as its code."""
    text = "\ud800<"
    leave_pages(tmp_path, [Heading(text), Figure(text, "x.png"), Text(text), Table(text, ["a"], [["b"]])])
    page = evaluate.draw_report(tmp_path).read_text(encoding="utf-8")
    # The heading stands in the contents, too.
    assert page.count("\\ud800&lt;") == 2 + 3 * len(evaluate.PAGE_FOLDERS)


def test_draw_report__sections_stand_in_the_order_of_the_thesis(tmp_path):
    """Whatever the order in which stages left them, headings follow the thesis, an unknown one comes last."""
    shuffled = ["Unknown", *reversed(evaluate.HEADINGS)]
    items = []
    for heading in shuffled:
        items += [Heading(heading), Text(heading)]
    leave_pages(tmp_path, items)
    page = evaluate.draw_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == [*evaluate.HEADINGS, "Unknown"]


def test_draw_report__every_link_has_its_place(tmp_path):
    """Each link of the contents leads to an id that is there once; every heading has one."""
    lungaug.write(tmp_path / "gan" / "a_1.png", lungaug.png(np.zeros((6, 4), np.uint8)))
    leave_pages(tmp_path, [Heading("2 Dataset"), Figure("A", "a_1.png"), Heading("<Odd> heading"), Text("a")])
    page = evaluate.draw_report(tmp_path).read_text(encoding="utf-8")
    links, ids = re.findall('href="#([^"]*)"', page), re.findall(' id="([^"]*)"', page)
    assert set(links) <= set(ids) and len(ids) == len(set(ids))
    assert {"2-dataset", "odd-heading", "gan-a-1", "this-run"} <= set(links)


def test_draw_report__the_title_names_the_run(tmp_path):
    """Two open pages can be told apart: the title and the first heading hold the folder's name, escaped."""
    run = tmp_path / "my <run>"
    leave_pages(run, [Heading("2 Dataset"), Text("a")])
    page = evaluate.draw_report(run).read_text(encoding="utf-8")
    assert re.search("<title>my &lt;run&gt;", page) and re.search("<h1>[^<]*my &lt;run&gt;", page)


@pytest.mark.parametrize("there", [("prepared",), ("prepared", "gan"), ("gan", "evaluation")])
def test_draw_report__a_stage_without_a_page_is_left_out(tmp_path, there):
    """Of stages that have not run nothing is shown; the page says which command comes next."""
    leave_pages(tmp_path, [Heading("2 Dataset"), Text("a")])
    for name in evaluate.PAGE_FOLDERS:
        if name not in there:
            (tmp_path / name / "options.json").unlink()
    page = evaluate.draw_report(tmp_path).read_text(encoding="utf-8")
    missing = next(stage for stage, name in zip(lungaug.STAGES, evaluate.PAGE_FOLDERS) if name not in there)
    assert page.count("<p>a</p>") == len(there) and f"Next: <code>python {missing}.py --run" in page


def test_draw_report__of_no_stage_is_one_line(tmp_path):
    """Where no stage has run, the message says what to run; no page is written."""
    with pytest.raises(Refusal, match="options.json: not found — run python lungaug.py"):
        evaluate.draw_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("page", [None, [1], [{"kind": "table"}], [{"kind": "text", "text": "before a heading"}]])
def test_draw_report__a_damaged_page_is_one_line(tmp_path, page):
    """A page that is not one is a Refusal that names its file, never a traceback."""
    leave_pages(tmp_path, [Heading("2 Dataset"), Text("a")])
    lungaug.write(tmp_path / "classifiers" / "options.json", {"page": page})
    with pytest.raises(Refusal, match="classifiers/options.json"):
        evaluate.draw_report(tmp_path)


@pytest.mark.parametrize("key, value", [("options", [1]), ("facts", "x"), ("facts", [1]), ("options", {"preset": []})])
def test_draw_report__damaged_options_are_one_line_or_left_out(tmp_path, key, value):
    """Options or facts that are none: a Refusal that names the file, or a page without them."""
    leave_pages(tmp_path, [Heading("2 Dataset"), Text("a")])
    page = lungaug.read_json(tmp_path / "gan" / "options.json", "")
    lungaug.write(tmp_path / "gan" / "options.json", page | {key: value})
    try:
        evaluate.draw_report(tmp_path)
    except Refusal as refusal:
        assert "gan/options.json" in str(refusal)


# This run

def test_run_html__marks_what_differs_from_the_preset(tmp_path, monkeypatch):
    """A changed option's row is marked and shows the preset's value; others say that they are the same."""
    monkeypatch.setattr(sys, "argv", ["train_gan.py"])
    options = lungaug.parse("", "train_gan", words=["--epochs", "7"])
    lungaug.apply_preset(options, "train_gan", "demo")
    lungaug.save_page(tmp_path / "gan", options, [])
    page = lungaug.read_json(tmp_path / "gan" / "options.json", "")
    text = "".join(evaluate.run_html({"train_gan": page}))
    assert '<tr class="changed"><td>--epochs</td><td>7</td><td>640</td><td>all</td></tr>' in text
    assert text.count('class="changed"') == 1 and "<td>--width</td><td>4</td><td>the same</td>" in text
    for name in ("device", "threads", "Python", "PyTorch", "NumPy", "system", "commit"):
        assert f"<td>{name}</td>" in text


def test_joined__says_which_stage_differs():
    """One text where all agree; else each value with the stages that have it."""
    assert evaluate.joined({"a": "1", "b": "1"}) == "1"
    assert evaluate.joined({"a": "1", "b": "2", "c": "1"}) == "1 (a, c); 2 (b)"


@pytest.mark.parametrize("fault", ["no git", "no checkout", "slow"])
def test_commit_name__never_fails(monkeypatch, tmp_path, fault):
    """Without git, outside a checkout, or where git hangs, there is no commit, and no error."""
    def run(*_, **__):
        raise FileNotFoundError("git") if fault == "no git" else subprocess.TimeoutExpired("git", 5)

    if fault == "no checkout":
        monkeypatch.setattr(lungaug, "HERE", tmp_path)
    else:
        (tmp_path / ".git").mkdir()
        monkeypatch.setattr(lungaug, "HERE", tmp_path)
        monkeypatch.setattr(lungaug.subprocess, "run", run)
    assert lungaug.commit_name() == ""


# The captions

def test_captions__name_functions_that_exist(tmp_path, monkeypatch):
    """Every function that a page names as a figure's code is one, in the file that it says."""
    named = set()
    for path in lungaug.HERE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for names in re.findall(r"code=\(([^)]*)\)", text):
            named |= set(re.findall('"([a-z_0-9.]+)"', names))
    assert len(named) > 20
    for name in named:
        module, _, function = name.partition(".")
        assert callable(getattr(importlib.import_module(module), function)), name


@pytest.mark.parametrize("nodules, negatives", [(1, 2), (2, 1), (3, 3), (5, 9)])
def test_sample_items__a_name_for_each_row_of_the_picture(tmp_path, nodules, negatives):
    """Of one or two training cubes there are as many rows, and their names are not spread over other ones."""
    dataset = small_run(tmp_path, nodules=(nodules, 1, 1), negatives=(negatives, 1, 1))
    evaluate.draw_cubes(tmp_path, dataset)
    figures = {item.file: item for item in evaluate.sample_items(dataset) if isinstance(item, Figure)}
    for file, count in (("figure_2.png", nodules), ("figure_3.png", negatives)):
        names = figures[file].rows
        assert len(names) == 2 * min(count, 3) and names[-1] == f"sample {min(count, 3)}, mediastinal window"
        # A cube of 6 is a row of six slices; each is drawn eightfold, and 6 pixels are around it.
        _, height = evaluate.png_size((tmp_path / file).read_bytes())
        assert height == 8 * (6 + len(names) * (8 + 6))


# Charts

def rows_of_gan(count):
    """Rows of the GAN's log, of values at the edges of what is possible; α changes after three quarters."""
    rows = []
    for epoch in range(1, count + 1):
        odd = epoch % 2
        critic = dict(wasserstein=5.0 * odd, penalty=0.1 * odd, auxiliary=0.1 * odd, real_accuracy=1.0 * odd,
                      fake_accuracy=1 - 0.2 * odd)
        rows.append({"epoch": epoch, "alpha": 3.0 if epoch <= 0.75 * count else 10.0, "critic": critic,
                     "generator": {"auxiliary": 0.2 * odd}})
    return rows


@pytest.mark.parametrize("term, low, high", [("penalty", 0, math.inf), ("auxiliary", 0, math.inf),
                                             ("real_accuracy", 0, 1), ("fake_accuracy", 0, 1)])
def test_gan_line__its_band_stays_where_values_are_possible(term, low, high):
    """No penalty or cross-entropy below 0, no accuracy outside 0 to 1; the estimate's band is as it was."""
    line = evaluate.gan_line("a", rows_of_gan(40), "critic", term)
    assert line.band[0].min() >= low and line.band[1].max() <= high
    free = evaluate.gan_line("a", rows_of_gan(40), "critic", "wasserstein")
    assert free.band[0].min() < 0


def test_figure_7__marks_where_alpha_changes():
    """A dashed line with α's new value in each of the four charts, at the epoch of the change."""
    assert evaluate.alpha_marks(rows_of_gan(40)) == [("α = 10", 31)]
    assert evaluate.figure_7(rows_of_gan(40)).count(">α = 10<") == 4


def test_figure_8__one_axis_for_all_arms_and_the_kept_epoch():
    """The charts have one range of y, whatever their own; the best F1 is marked, ties by the lower loss."""
    logs = {arm: [{"epoch": epoch, "train_loss": height, "validation_loss": height / epoch, "validation_f1": f1}
                  for epoch, f1 in ((1, 0.2), (2, 0.5), (3, 0.5), (4, 0.1))]
            for arm, height in (("real", 1.0), ("longer", 2.0), ("fake", 9.0))}
    figure = evaluate.figure_8(logs)
    assert len(re.findall('data-y="([^"]*)"', figure)) == 3 and len(set(re.findall('data-y="([^"]*)"', figure))) == 1
    assert figure.count(">kept: 3<") == 3


# The worst errors

def test_worst_errors__one_flip_of_a_nodule_and_the_worst_first():
    """False positives from the highest probability down; of each missed nodule its worst flip, from the lowest up."""
    labels = np.repeat([1, 0], [16, 4])
    first = np.full(8, 0.9)
    first[3], first[5] = 0.1, 0.4
    second = np.full(8, 0.3)
    scores = np.concatenate([first, second, [0.6, 0.2, 0.99, 0.5]])
    test = evaluate.Scored(labels, evaluate.flip_weights(labels), np.zeros(20, int), {"real": scores[None]})
    places = evaluate.number_places(np.repeat(np.arange(6), [8, 8, 1, 1, 1, 1])[:, None])
    assert evaluate.worst_errors(test, "real", places) == {"false positive": [18, 16], "false negative": [3, 8]}


def test_thresholds_of__the_middle_one_is_a_half():
    """At the slider's middle stand the counts of argmax; to the left more, to the right fewer are called positive."""
    labels = np.repeat([1, 0], [8, 12])
    scores = np.random.default_rng(0).uniform(0, 1, (2, 20))
    test = evaluate.Scored(labels, evaluate.flip_weights(labels), np.zeros(20, int), {"real": scores})
    item = evaluate.thresholds_of(test)
    assert item.thresholds[80] == 0.5 and len(item.thresholds) == len(item.counts["real"]) == 161
    at_half = [evaluate.confusion_matrix(labels, row > 0.5) for row in scores]
    assert item.counts["real"][80] == np.mean(at_half, axis=0).tolist()
    called = [tp + fp for tp, fp, _, _ in item.counts["real"]]
    assert called == sorted(called, reverse=True) and called[0] > called[-1]


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (400, 1400, 1920)

# In each frame: how far the page is too wide; then what a slider, the threshold and a key change.
PROBE = """
addEventListener("load", () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const move = (figure, value) => {
      const slider = figure.querySelector("input");
      slider.value = value;
      slider.dispatchEvent(new Event("input"));
    };
    const row = {overflow: root.scrollWidth - root.clientWidth};
    const figure = page.querySelector("[data-first]"), picture = figure.querySelector("img");
    const shown = () => [figure.querySelector("output").textContent, getComputedStyle(picture).objectPosition];
    row.before = shown();
    row.shape = picture.clientWidth / picture.clientHeight;
    move(figure, 0);
    row.after = shown();
    figure.querySelector("button").click();
    row.whole = picture.clientWidth / picture.clientHeight;
    const threshold = page.querySelector("[data-thresholds]");
    const cells = () => [...threshold.querySelectorAll("tbody tr")].map(line => line.innerText);
    row.matrix = cells();
    move(threshold, 0);
    row.moved = cells();
    row.dots = page.querySelectorAll(".dot").length;
    const chart = page.querySelector(".charts svg");
    chart.focus();
    row.tip = [...chart.querySelectorAll(".tip text")].map(line => line.textContent);
    found.push(row);
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def leave_whole_page(run):
    """Let a run leave a page with every kind of item, the wide and the long ones, too."""
    folder = run / "evaluation"
    lungaug.write(folder / "steps.png", lungaug.png(np.zeros((90, 60), np.uint8)))
    lungaug.write(folder / "figure_7.svg", evaluate.figure_7(rows_of_gan(40)))
    labels = np.repeat([1, 0], [8, 12])
    scores = np.random.default_rng(0).uniform(0, 1, (1, 20))
    test = evaluate.Scored(labels, evaluate.flip_weights(labels), np.zeros(20, int), {"real": scores, "fake": scores})
    lungaug.write(folder / "roc.svg", evaluate.figure_roc(test))
    items = [Heading("4.1 Wasserstein GAN: samples through the training"),
             Figure("Steps of " + "9" * 200, "steps.png", ("evaluate.slices",), ("one", "two", "three"),
                    ("axial, coronal, sagittal",) * 8, 1.0, first=2),
             Figure("Figure 7. Curves.", "figure_7.svg"), Heading("Beyond the thesis: operating points"),
             evaluate.thresholds_of(test), Figure("ROC.", "roc.svg"),
             Table("Wide.", ["number"] * 20, [["1,234,567.890"] * 20, ["word " * 90] + ["9" * 90] * 19])]
    leave_pages(run, items[:3])
    lungaug.write(folder / "options.json", {"page": [as_item(item) for item in items]})


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed: the page is not opened in a browser")
def test_page__in_a_browser(tmp_path):
    """At three widths: no error, nothing too wide; the sliders move what they should, and a chart tells its values."""
    leave_whole_page(tmp_path)
    page = evaluate.draw_report(tmp_path).read_text(encoding="utf-8")
    # As it is, for errors of its own; then in frames without its policy, which forbids our probe.
    _, errors = dump(tmp_path / "report.html", tmp_path)
    assert errors == []

    free = html.escape(page.replace(evaluate.POLICY, ""))
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{free}"></iframe>' for width in WIDTHS)
    (tmp_path / "frames.html").write_text(f'<!doctype html><meta charset="utf-8"><pre id="found"></pre>{frames}'
                                          f"<script>{PROBE}</script>", encoding="utf-8")
    dom, errors = dump(tmp_path / "frames.html", tmp_path)
    assert errors == []
    rows = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', dom)[1]))
    assert len(rows) == len(WIDTHS)
    for row in rows:
        assert row["overflow"] <= 0
        # From the third row of a picture of 60 × 90 pixels to the first, then all three at once.
        assert (row["before"], row["after"]) == (["three", "0px 100%"], ["one", "0px 0%"])
        assert row["shape"] == pytest.approx(60 / 30, rel=0.02) and row["whole"] == pytest.approx(60 / 90, rel=0.02)
        assert row["matrix"] != row["moved"] and row["moved"][0].split()[:5] == ["real", "8", "12", "0", "0"]
        assert row["dots"] == 2 and row["tip"][0].startswith("epoch ") and "f(real)" in row["tip"][1]


def dump(path, folder):
    """A page's DOM after its scripts have run, and the errors that the browser told."""
    # A user of its own would need a sandbox that containers lack.
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", f"--user-data-dir={folder / 'browser'}", "--enable-logging=stderr",
               "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=60)
    said = done.stderr.decode(errors="replace").splitlines()
    return done.stdout.decode(), [line for line in said if "CONSOLE" in line]

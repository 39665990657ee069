"""The page, report.html: its parts, the order of its sections, what a hostile file may put on it.

    python -m pytest tests/test_page.py -v
"""

import re

import lungaug
from lungaug import Figure, Heading, Refusal, Table, Text

import pytest

import evaluate


def leave_pages(run, items):
    """Let each stage of a run leave these items as its page."""
    as_json = [{"kind": type(item).__name__.lower(), **item._asdict()} for item in items]
    for name in evaluate.PAGE_FOLDERS:
        lungaug.write(run / name / "options.json", {"page": as_json})


def test_table_html__cells_are_escaped():
    """A cell or a caption with mark-up is text; a line end or a terminal code is escaped."""
    table = evaluate.table_html("<b>", ("<i>",), [("<script>\n\x1b",), (1.5,)])
    assert table == ("<p>&lt;b&gt;</p><table><tr><th>&lt;i&gt;</th></tr>"
                     "<tr><td>&lt;script&gt;\\n\\x1b</td></tr><tr><td>1.5</td></tr></table>")


def test_figure_html__inline_or_said_to_be_missing(tmp_path):
    """A picture's bytes stand in the page; where there is none the caption says so, escaped."""
    lungaug.write(tmp_path / "a.png", b"\x89PNG")
    assert "data:image/png;base64,iVBORw==" in evaluate.figure_html(tmp_path / "a.png", "A")
    missing = evaluate.figure_html(tmp_path / "b.png", "<B>")
    assert "&lt;B&gt;" in missing and "<B>" not in missing and "img" not in missing


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
    assert page.count("\\ud800&lt;") == 1 + 3 * len(evaluate.PAGE_FOLDERS)


def test_draw_report__sections_stand_in_the_order_of_the_thesis(tmp_path):
    """Whatever the order in which stages left them, headings follow the thesis, an unknown one comes last."""
    shuffled = ["Unknown", *reversed(evaluate.HEADINGS)]
    items = []
    for heading in shuffled:
        items += [Heading(heading), Text(heading)]
    leave_pages(tmp_path, items)
    page = evaluate.draw_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == [*evaluate.HEADINGS, "Unknown"]


def test_draw_report__a_stage_without_a_page_is_one_line(tmp_path):
    """Where a stage has not run, the message says what to run; no page is written."""
    leave_pages(tmp_path, [Heading("2 Dataset"), Text("a")])
    (tmp_path / "gan" / "options.json").unlink()
    with pytest.raises(Refusal, match="gan/options.json: not found — run python lungaug.py"):
        evaluate.draw_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("page", [None, [1], [{"kind": "table"}], [{"kind": "text", "text": "before a heading"}]])
def test_draw_report__a_damaged_page_is_one_line(tmp_path, page):
    """A page that is not one is a Refusal that names its file, never a traceback."""
    leave_pages(tmp_path, [Heading("2 Dataset"), Text("a")])
    lungaug.write(tmp_path / "classifiers" / "options.json", {"page": page})
    with pytest.raises(Refusal, match="classifiers/options.json"):
        evaluate.draw_report(tmp_path)

"""Reports and the page for raters in headless Chromium: images show, sorting works, nothing leaves the file.

Skipped where there is no Chromium, unless DRIFTRL_REQUIRE_BROWSER is set, as in CI.
"""

from __future__ import annotations

import json
import os
import re

import pytest
from browser import Browser, find_chromium
from made import PROMPTS, make_run

from driftrl.evaluation.blind import write_blind
from driftrl.evaluation.comparison import write_comparison
from driftrl.evaluation.judge import judge
from driftrl.evaluation.page import COLOURS
from driftrl.evaluation.report import write_report

WIDTHS = (360, 800, 1400)
SHOWN = "Promise.all([...document.images].map((i) => i.decode())).then(() => [...document.images].map((i) => i.naturalWidth))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None and os.environ.get("DRIFTRL_REQUIRE_BROWSER"):
        pytest.fail("no Chromium on the path, and DRIFTRL_REQUIRE_BROWSER is set")
    if program is None:
        pytest.skip("no Chromium on the path")
    with Browser(program, tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One page of each kind, by name."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        make_run(folder / f"{name}{seed}", name, seed, loss=loss)
        for name, loss in (("grpo", 0.2), ("drift", 0.05))
        for seed in (0, 1)
    ]
    return {
        "run": write_report(runs[0]),
        "comparison": write_comparison(runs, folder / "comparison.html"),
        "blind": write_blind([runs[0], runs[2]], folder / "blind", seed=0),
    }


@pytest.fixture
def opened(browser):
    """Opens pages; at the end none may have complained or asked for anything beyond itself."""
    found = []

    def show(*arguments, **settings):
        found.append(browser.open(*arguments, **settings))
        return found[-1]

    yield show
    for page in found:
        page.evaluate("1")  # events before this answer have arrived
        assert page.problems == [] and page.outside == [] and page.requests[0] == page.address


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["run", "comparison", "blind"])
def test_opens_at_every_width(opened, pages, kind, dark):
    page = opened(pages[kind], dark=dark)
    widths = page.evaluate(SHOWN)
    assert len(widths) == {"run": 6, "comparison": 9, "blind": 6}[kind] and min(widths) > 0
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    ink = page.evaluate("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
    assert (max(paper) < 60 and min(ink) > 200) if dark else (min(paper) > 200 and max(ink) < 60)
    for width in WIDTHS:
        page.resize(width)
        if kind == "blind":  # the start, and then a pair
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.evaluate("document.getElementById('work').hidden && document.getElementById('go').click()")
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]


def test_an_error_and_a_request_would_be_seen(browser, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<img src='http://example.invalid/x.png'><script>console.error('no'); missing()</script>"
    )
    page = browser.open(tmp_path / "bad.html")
    page.wait("document.images[0].complete")
    assert page.outside == ["http://example.invalid/x.png"]
    assert any("console.error" in p for p in page.problems) and any("missing" in p for p in page.problems)


def test_sorting(opened, pages):
    page = opened(pages["run"])
    rows = "[...document.querySelectorAll('.sortable tbody tr')].map((row) => row.cells[{}].textContent)"
    heads = page.evaluate(
        "[...document.querySelectorAll('.sortable th[scope=col]')].map((h) => h.textContent.trim())"
    )
    assert heads[0] == "prompt" and sorted(page.evaluate(rows.format(0))) == sorted(PROMPTS)
    for column in range(len(heads)):
        values = {}
        for turn in range(2):
            page.click(".sortable th[scope=col] button", column)
            sort = page.evaluate(f"document.querySelectorAll('.sortable th[scope=col]')[{column}].ariaSort")
            assert page.evaluate("document.querySelectorAll('.sortable [aria-sort]').length") == 1
            shown = page.evaluate(rows.format(column))
            values[sort] = shown if column == 0 else [number(text) for text in shown]
            assert ("least" if sort == "ascending" else "greatest") in page.evaluate(
                "document.getElementById('sorted').textContent"
            ), turn
        assert values.keys() == {"ascending", "descending"}
        if column:
            assert values["ascending"] == sorted(values["ascending"])
            assert values["descending"] == sorted(values["descending"], reverse=True)
        else:
            assert values["ascending"] == values["descending"][::-1] and set(values["ascending"]) == set(
                PROMPTS
            )


def test_sorting_a_comparison(opened, pages):
    """Each table by itself, by what is shown; what cannot be compared stays at the end."""
    page = opened(pages["comparison"])
    tables = page.evaluate("document.querySelectorAll('.sortable').length")
    assert tables == 3
    for table in range(tables):
        this = f"document.querySelectorAll('.sortable')[{table}]"
        heads = page.evaluate(f"[...{this}.tHead.rows[0].cells].map((h) => h.textContent.trim())")
        for column, head in enumerate(heads):
            for sort in ("ascending", "descending"):
                page.evaluate(f"{this}.tHead.rows[0].cells[{column}].firstElementChild.click()")
                assert page.evaluate(f"{this}.tHead.rows[0].cells[{column}].ariaSort") == sort
                shown = page.evaluate(
                    f"[...{this}.tBodies[0].rows].map((r) => r.cells[{column}].textContent.trim())"
                )
                if head in ("method", "measure"):
                    values = [text.lower() for text in shown]
                else:
                    values = [
                        number(re.split("[(,]", text)[0]) for text in shown if re.match("[\u2212+\\d]", text)
                    ]
                    assert all(re.match("[\u2212+\\d]", text) for text in shown[: len(values)] if text)
                assert values == sorted(values, reverse=sort == "descending"), (head, shown)
        told = page.evaluate(f"{this}.closest('section').querySelector('[role=status]').textContent")
        assert told == f"Sorted by {heads[-1]}, greatest first."


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A comparison of more methods than there are hues that anyone can tell apart."""
    folder = tmp_path_factory.mktemp("many")
    runs = [make_run(folder / f"m{k}", f"method-{k}", loss=0.01 + 0.01 * k) for k in range(COLOURS)]
    return write_comparison(runs, folder / "many.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_methods_have_colours_of_their_own_and_can_be_brought_out(opened, many, dark):
    page = opened(many, dark=dark)
    swatches = "[...document.querySelectorAll('.legend button .mark')].map((m) => getComputedStyle(m).fill)"
    colours = page.evaluate(swatches)
    assert len(set(colours)) == len(colours) == COLOURS
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert min(contrast(colour, paper) for colour in colours) > 3  # WCAG 2.2, 1.4.11
    faint = (
        "[...document.querySelectorAll('.plot [class*=\" c\"]:not(.cb)')]"
        ".filter((part) => getComputedStyle(part).opacity < .1).map((part) => part.getAttribute('class'))"
    )
    assert page.evaluate(faint) == []
    page.click(".legend button", 2)
    dimmed = page.evaluate(faint)
    assert dimmed and not any("c2" in each.split() for each in dimmed)
    page.click(".legend button", 2)
    assert page.evaluate(faint) == []
    page.resize(360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    narrow = page.evaluate(
        "Math.min(...[...document.images].map((i) => i.getBoundingClientRect().width).filter(Boolean))"
    )
    assert narrow > 60  # 17 pictures side by side would be 20 pixels each


def contrast(one, other):
    """Contrast ratio of two CSS colours, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def number(text):
    return float(text.split("\u2192")[-1].replace("\N{MINUS SIGN}", "-").removesuffix("%"))


def test_pictures_are_enlarged_and_the_arrow_keys_go_on(opened, pages):
    page = opened(pages["run"])
    page.click(".pair")
    first = page.evaluate("document.getElementById('zoomed').textContent")
    page.press("ArrowRight")
    second = page.evaluate("document.getElementById('zoomed').textContent")
    assert {first, second} < set(PROMPTS) and first != second
    assert (
        page.evaluate("[...document.querySelectorAll('dialog img')].map((i) => i.naturalWidth > 0)")
        == [True] * 2
    )
    page.press("ArrowLeft")
    assert page.evaluate("document.getElementById('zoomed').textContent") == first
    page.press("Escape")
    page.wait("!document.getElementById('zoom').open")


STATE = "[document.getElementById('place').textContent, document.querySelector('.question.now')?.dataset.question]"


def test_all_pairs_are_answered_by_keyboard(browser, opened, pages, tmp_path):
    browser.downloads_to(tmp_path)
    page = opened(pages["blind"])
    page.evaluate("localStorage.clear()")
    page.load()
    page.click("#rater")
    page.send("Input.insertText", text="Ann")
    page.press("Enter")
    assert page.evaluate(STATE) == ["Pair 1 of 3", "coherence"]
    keys = ["ArrowLeft", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"]
    for key in keys[:3]:
        page.press(key)
    assert page.evaluate(STATE) == ["Pair 2 of 3", "distinctiveness"]

    page.load()  # as if the rater had gone away and come back
    assert page.evaluate("document.getElementById('rater').value") == "Ann"
    page.press("Tab")
    page.click("#go")
    assert page.evaluate(STATE) == ["Pair 2 of 3", "distinctiveness"]

    for _ in range(3):
        page.press("Backspace")
    assert page.evaluate(STATE) == ["Pair 1 of 3", "coherence"]
    pressed = page.evaluate("document.querySelector('.question.now [aria-pressed=true]').dataset.choice")
    assert pressed == "left"
    page.press("ArrowRight")  # changes the first answer; the second stands
    for _ in range(2):
        page.click("#next")
    assert page.evaluate(STATE) == ["Pair 2 of 3", "distinctiveness"]
    for key in keys[3:]:
        page.press(key)
    assert page.evaluate("document.activeElement.id") == "save"
    page.press("Enter")

    file = tmp_path / "answers.json"
    for _ in range(500):
        if file.is_file() and file.read_text().endswith("}\n"):
            break
        page.evaluate("new Promise((done) => setTimeout(done, 20))")
    answers = json.loads(file.read_text())
    given = [(a["coherence"], a["distinctiveness"]) for a in answers["answers"]]
    assert answers["rater"] == "Ann" and given == [("right", "same"), ("right", "right"), ("same", "left")]
    coherence, _ = judge(pages["blind"].parent, [file]).findings
    assert (coherence.left, coherence.same, coherence.right) == (0, 1, 2)


def test_all_pairs_are_answered_with_the_mouse_in_any_order(opened, pages):
    page = opened(pages["blind"], width=360)
    page.evaluate("localStorage.clear()")
    page.load()
    page.click("#go")
    page.click(".trial:not([hidden]) .set")
    assert page.evaluate("document.querySelector('dialog img').naturalWidth") > 0
    page.press("ArrowLeft")  # with the picture enlarged, keys answer nothing
    page.click("dialog button")
    assert page.evaluate(STATE) == ["Pair 1 of 3", "coherence"]
    assert page.evaluate("document.getElementById('next').disabled")
    page.click("[data-question=distinctiveness] [data-choice=same]")
    assert page.evaluate(STATE) == ["Pair 1 of 3", "coherence"]
    page.click("[data-question=coherence] [data-choice=left]")
    assert page.evaluate(STATE) == ["Pair 2 of 3", "coherence"]
    for _ in range(2):
        page.click("[data-question=coherence] [data-choice=left]")
        page.click("[data-question=distinctiveness] [data-choice=right]")
    assert not page.evaluate("document.getElementById('end').hidden")

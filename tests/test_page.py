"""The report in a real browser, opened from its file."""

import re
from pathlib import Path

import pytest

from tests.report_cases import HOSTILE, a_model, a_summary, hostile, retrained
from upweight.report import render

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=str(CHROMIUM), args=quiet)
        yield found
        found.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Open a summary's page from its file; everything it asked for or complained of is checked."""
    contexts, asked, said = [], [], []

    def open_page(summary, *, width=1280, script=True, **settings):
        file = tmp_path / "report.html"
        file.write_text(render(summary), encoding="utf-8")
        size = {"width": width, "height": 900}
        context = browser.new_context(
            viewport=size, java_script_enabled=script, reduced_motion="reduce", **settings
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert said == []


def test_browser_draws_every_point_once(visit):
    page = visit(a_summary())
    count = len(a_model()["evidence"]["points"])
    assert page.locator('.scatter[data-panel="all"] .mark').count() == count
    assert page.locator('.scatter[data-panel="random"] .mark').count() == count // 2


def test_browser_runs_nothing_hostile(visit):
    page = visit(hostile(a_summary(a_model(), a_model("network"))))
    assert page.title() == HOSTILE + " · upweight"
    assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0
    assert page.locator(".tabs button").first.text_content() == HOSTILE


@pytest.mark.parametrize("pictured", [True, False])
@pytest.mark.parametrize("width", [320, 390, 768, 1400])
def test_browser_never_scrolls_sideways(visit, width, pictured):
    model = a_model(pictured=pictured)
    model["queries"][0]["id"] = model["queries"][0]["title"] = "unbroken" * 30
    model["suspects"]["rows"][0]["id"] = "unbroken" * 30
    model["queries"][0]["helpful"][0]["label"] = "unbroken" * 30
    model["retrained"] = retrained()
    model["retrained"]["findings"][0]["ratings"][1]["name"] = "unbroken" * 30
    page = visit(a_summary(model, a_model("unbroken" * 12)), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("key", "lines"), [("image-00013.png", 1), (13, 1), ("unbroken" * 12, 8)])
def test_browser_keeps_ids_of_suspects_readable_on_a_phone(visit, key, lines):
    model = a_model(pictured=False)
    for row in model["suspects"]["rows"]:
        row["id"] = key
        row["given"], row["predicted"] = "pneumonia", "healthy"
    box = visit(a_summary(model), width=400).locator(".ranking td.id span").first.bounding_box()
    # A line is about 20 px high.
    assert box["height"] < 22 * lines
    assert box["width"] < 200


def test_browser_without_scripts_shows_all_models(visit):
    page = visit(a_summary(a_model(), a_model("network")), script=False)
    assert page.locator(".model:visible").count() == 2
    assert page.locator(".tabs, th button").count() == 0
    assert page.locator("#tip:visible").count() == 0
    assert page.locator(".scatter title").count() > 20
    page.locator("summary").first.click()
    assert page.locator(".ranking:visible").count() == 1


def test_browser_tabs_by_mouse_keys_and_link(visit):
    page = visit(a_summary(a_model(), a_model("network")))
    tabs = page.get_by_role("tab")
    assert page.locator(".model:visible").count() == 1
    tabs.nth(1).click()
    assert page.locator("#m2").is_visible()
    tabs.nth(1).press("ArrowRight")
    assert page.locator("#m1").is_visible()
    assert tabs.nth(0).get_attribute("aria-selected") == "true"
    page.locator('.overview a[href="#m2"]').click()
    page.locator("#m2").wait_for(state="visible")
    page.emulate_media(media="print")
    assert page.locator(".model:visible").count() == 2


def test_browser_sorts_by_number_both_ways(visit):
    page = visit(a_summary(a_model(pictured=False)))
    head = page.locator(".ranking th", has_text="Loss")
    losses = page.locator(".ranking tbody tr td:nth-child(6)")
    head.locator("button").press("Enter")
    values = [float(text) for text in losses.all_text_contents()]
    assert values == sorted(values, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    values = [float(text) for text in losses.all_text_contents()]
    assert values == sorted(values)


def test_browser_says_what_a_point_is(visit):
    page = visit(a_summary())
    chart = page.locator(".scatter").first
    chart.focus()
    page.keyboard.press("ArrowRight")
    first = page.locator("#tip").text_content()
    assert re.match(r"query \d+, without \d+: predicted [−+]", first)
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    # Hovering the drawing itself waits until scrolling has come to rest.
    outer, inner = chart.bounding_box(), chart.locator(".mark").nth(3).bounding_box()
    x = inner["x"] + inner["width"] / 2 - outer["x"]
    y = inner["y"] + inner["height"] / 2 - outer["y"]
    chart.hover(position={"x": x, "y": y})
    page.locator("#tip").wait_for(state="visible")


def test_browser_draws_methods_under_their_ceiling(visit):
    page = visit(a_summary({**a_model(), "retrained": retrained(), "evidence": None}))
    drawing = page.locator(".ladder").first
    rungs = drawing.locator(".mark")
    assert rungs.count() == 5
    first, second = (rungs.nth(k).bounding_box() for k in (0, 1))
    line = drawing.locator(".diagonal").bounding_box()
    assert second["x"] < first["x"] < line["x"]
    assert first["y"] < second["y"]
    drawing.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert re.match(r"\w+: [−0-9.]+ \[", page.locator("#tip").text_content())
    assert page.locator('.scatter[data-panel="all"] .mark').count() == 120
    assert page.locator(".compared:visible").count() == 1


def luminance(colour):
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_text_can_be_read_in_both_schemes(visit, scheme):
    page = visit(a_summary({**a_model(), "retrained": retrained()}), color_scheme=scheme)
    colour = "element => getComputedStyle(element).color"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for place in ("h1", ".aside", ".helpful .score", ".harmful .score", ".word", ".tag", ".id"):
        ink = page.locator(place).first.evaluate(colour)
        light, dark = sorted([luminance(ink), luminance(paper)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, place
    # What is drawn needs less, but must be seen.
    stroke = "element => getComputedStyle(element).stroke"
    for place in (".whisker", ".ladder .diagonal", ".ladder .k3"):
        ink = page.locator(place).first.evaluate(stroke)
        light, dark = sorted([luminance(ink), luminance(paper)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, place

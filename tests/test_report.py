"""The report: pictures, verdicts and the page as text."""

import base64
import copy
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.report_cases import HOSTILE, a_model, a_summary, agreement, hostile, retrained
from upweight.errors import InputError
from upweight.report import picture, render
from upweight.report.ladder import ladder
from upweight.report.numbers import figure, scale_of
from upweight.report.pictures import MAX_SIDE
from upweight.report.scatter import MAX_POINTS, scatter
from upweight.report.verdict import verdict


def pixels(uri):
    """Decode an unfiltered 8-bit PNG, checking every length and checksum."""
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    data = base64.b64decode(body, validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack_from(">I", data, place)
        kind, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size) == (zlib.crc32(kind + content),)
        chunks[kind], place = content, place + 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, *rest) == (8, 0, 0, 0)
    channels = {0: 1, 2: 3}[colour]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, channels)


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.open.pop()

    def handle_data(self, data):
        if not self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def embedded(page):
    (text,) = re.findall(
        r'<script type="application/json" id="upweight-summary">(.*?)</script>', page
    )
    return json.loads(text, parse_constant=pytest.fail)


# Pictures


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7), (5, 7, 3), (1, 1)])
def test_bytes_come_back(shape):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    found = pixels(picture(array))
    expected = np.moveaxis(array, 0, 2) if shape == (1, 5, 7) else array
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


def test_colours_first_is_colours_last():
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 7)).astype(np.uint8)
    assert picture(array) == picture(np.moveaxis(array, 0, 2))


def test_grey_is_stretched_from_its_minimum_to_its_maximum():
    found = pixels(picture(np.array([[-1.0, 0.0], [0.5, 1.0]])))
    np.testing.assert_array_equal(found[:, :, 0], [[0, 128], [191, 255]])
    np.testing.assert_array_equal(pixels(picture(np.array([[0, 16]])))[:, :, 0], [[0, 255]])


def test_colours_between_0_and_1_are_kept_and_others_stretched():
    array = np.zeros((1, 2, 3))
    array[0, 1] = [0.2, 0.4, 0.6]
    np.testing.assert_array_equal(pixels(picture(array))[0, 1], [51, 102, 153])
    np.testing.assert_array_equal(pixels(picture(10 * array))[0, 1], [85, 170, 255])


def test_an_even_picture_is_black_and_huge_values_do_not_overflow():
    assert not pixels(picture(np.full((2, 2), 7.0))).any()
    np.testing.assert_array_equal(
        pixels(picture(np.array([[-1.7e308, 1.7e308]])))[:, :, 0], [[0, 255]]
    )


def test_large_pictures_are_averaged():
    array = np.zeros((2 * MAX_SIDE, 2 * MAX_SIDE - 1), np.uint8)
    array[::2] = 200
    found = pixels(picture(array))
    assert found.shape == (MAX_SIDE, MAX_SIDE, 1)
    assert (found == 100).all()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(64), r"\[64\].*Reshape"),
        (np.zeros((2, 5, 5)), r"\[2, 5, 5\].*Reshape"),
        (np.zeros((1, 3, 8, 8)), r"\[1, 3, 8, 8\].*one at a time"),
        (np.zeros((0, 4)), "at least one pixel"),
        (np.array([[np.nan, 1.0]]), "finite"),
        (np.array([[np.inf, 1.0]]), "finite"),
        (np.array([["a"]]), "needs numbers"),
        (np.ones((2, 2), complex), "needs numbers"),
    ],
)
def test_what_is_no_picture_is_refused(array, said):
    with pytest.raises(InputError, match=said):
        picture(array)


# Numbers


def test_scales_give_the_largest_three_figures():
    scale = scale_of([3.21e-5, -1.0e-6, None, math.nan])
    assert scale.signed(3.21e-5) == "+32.1"
    assert scale.signed(-1.0e-6) == "−1.0"
    assert scale.signed(1e-9) == "0.0"
    assert scale.unit("nats") == "10⁻⁶ nats"
    assert scale_of([]).signed(0.0) == "0.0"


@pytest.mark.parametrize("value", [9.999, 0.0009999, 99999.0, 1e-300, -123456.0])
def test_figures_round_to_the_value(value):
    text = figure(value).replace("−", "-").replace(" × 10", "e")
    text = text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    assert float(text) == pytest.approx(value, rel=6e-3)


# The verdict


@pytest.mark.parametrize(
    ("rows", "grade", "said"),
    [
        ([], "unchecked", "Nothing here"),
        ([agreement()], "good", "face value"),
        ([agreement(slope=1.6)], "partly", "1.6 times as large"),
        ([agreement(r=0.8, spread=0.05)], "partly", "noisy"),
        ([agreement(r=0.97, spread=0.2)], "partly", "noisy"),
        ([agreement(r=0.3)], "not", "Do not act"),
        ([agreement(r=0.6, spread=0.7)], "not", "Do not act"),
        ([agreement(slope=-1.0)], "not", "Do not act"),
        ([agreement(r=math.nan)], "not", "do not vary"),
        ([agreement(count=3)], "partly", "too few"),
        ([agreement("most influential")], "partly", "nothing is known of the others"),
        ([agreement("most influential"), agreement(r=0.2)], "not", "Do not act"),
        ([agreement("most influential", slope=2.0), agreement()], "partly", "2.0 times"),
    ],
)
def test_the_weakest_row_decides(rows, grade, said):
    found = verdict({"evidence": {"agreements": rows, "points": []}})
    assert found.grade == grade
    assert said in found.headline


@pytest.mark.parametrize(
    ("row", "grade", "said"),
    [
        (agreement(), "good", "they say nothing of sizes"),
        (agreement(r=0.8, spread=0.05), "partly", "noisy."),
        (agreement(r=0.3), "not", "Do not act"),
        (agreement(r=math.nan), "not", "do not vary"),
        (agreement(count=3), "partly", "too few"),
    ],
)
def test_scores_that_only_rank_are_graded_by_their_order(row, grade, said):
    row = {**row, "slope": None, "slope_interval": [None, None]}
    found = verdict({"per": "length", "evidence": {"agreements": [row], "points": []}})
    assert found.grade == grade
    assert said in found.headline
    assert "slope" not in found.basis
    assert "r = " in found.basis.replace("\u00a0", " ") or grade == "not"


def test_the_page_of_scores_that_only_rank():
    model = {**a_model(), "per": "length", "retrained": retrained()}
    page = render(a_summary(model))
    text = Elements(page).text
    assert "loss 2.50 nats" in text
    assert "in 10⁻³ nats per length" in text or "in nats per length" in text
    assert "Scores are divided by length" in text
    assert "face value" not in text
    assert 'class="scatter" data-panel' not in page


def test_the_basis_counts_what_was_removed_and_does_not_round_up():
    points = [
        {"x": 0.0, "y": 0.0, "kind": "random", "query": q, "removed": i}
        for q in range(2)
        for i in range(20)
    ]
    row = agreement(r=0.9997, spread=0.0001)
    found = verdict({"evidence": {"agreements": [row], "points": points}})
    assert found.basis.startswith("20 examples removed at random")
    assert "40 pairs" in found.basis
    assert "r > 0.999" in found.basis.replace("\u00a0", " ")


def test_a_rough_inverse_and_missing_parameters_are_said():
    found = verdict({"worst_residual": 0.2, "coverage": 0.62, "evidence": None})
    assert found.notes[0] == "The inverse is approximated, to a relative residual of 0.20 at worst."
    assert "62 %" in found.notes[1]


# The drawing


def test_points_lie_where_their_values_are():
    points = [{"x": x, "y": x, "kind": "all", "query": 0, "removed": 0} for x in (-1.0, 0.0, 2.0)]
    (panel,) = scatter(points, "nats").panels
    for mark in panel.marks:
        assert mark.x - panel.left == pytest.approx(panel.bottom - mark.y, abs=0.02)
    (zero,) = [x for x, text in panel.x_ticks if float(text.replace("−", "-")) == 0]
    assert panel.marks[1].x == pytest.approx(zero, abs=0.02)


def test_what_cannot_be_drawn_is_left_out_and_very_many_are_thinned():
    point = {"x": 1.0, "y": 1.0, "kind": "all", "query": 0, "removed": 0}
    found = scatter([point, {**point, "y": math.nan}, {**point, "x": None}], "nats")
    assert (found.drawn, found.total) == (1, 3)
    many = scatter([point] * (2 * MAX_POINTS + 1), "nats")
    assert many.drawn <= MAX_POINTS
    assert scatter([], "nats").panels == ()
    assert len(scatter([{**point, "x": 0.0, "y": 0.0}], "nats").panels) == 1


def test_rungs_lie_where_their_values_are():
    finding = retrained()["findings"][0]
    found = ladder(finding, {"name": "LDS", "unit": ""})
    places = [x for x, _ in found.ticks]
    values = [float(text.replace("−", "-")) for _, text in found.ticks]
    unit = (places[-1] - places[0]) / (values[-1] - values[0])
    for rung, rating in zip(found.rungs, finding["ratings"], strict=True):
        ends = rating["order"]["interval"]
        for x, value in (
            (rung.x, rating["order"]["value"]),
            (rung.low, ends[0]),
            (rung.high, ends[1]),
        ):
            assert (x - places[0]) / unit == pytest.approx(value - values[0], abs=1e-3)
    assert found.zero == pytest.approx(places[values.index(0)], abs=0.02)
    assert (found.ceiling.x - found.zero) / unit == pytest.approx(0.84, abs=1e-3)
    assert [rung.first for rung in found.rungs] == [True, False, False, False, False]
    heights = [rung.y for rung in found.rungs]
    assert heights == sorted(heights)
    assert found.top < heights[0]
    assert heights[-1] < found.bottom


def test_rungs_without_a_number_are_not_drawn_and_those_without_an_interval_are_points():
    unknown = {"value": None, "interval": [None, None]}
    ratings = [
        {"name": "a", "order": {"value": 0.002, "interval": [None, None]}},
        {"name": "b", "order": unknown},
    ]
    found = ladder({"ratings": ratings, "ceiling": None}, {"name": "loss", "unit": "nats"})
    (rung,) = found.rungs
    assert rung.low == rung.x == rung.high
    assert found.label == "loss (10⁻³ nats)"
    assert found.ceiling is None


# The page


def test_every_section_is_there():
    page = render(a_summary())
    text = Elements(page).text
    for said in (
        "Which digits made the model say this?",
        "Predicted change of the loss (nats) if removed",
        "Predictions can be taken at face value.",
        "labelled 5, predicted 3",
        "+0.120",
        "−0.060",
        "removing one raises this query’s loss",
        "3 of the 4 labels known to be wrong are among the first 6 checked (75 %).",
        "refits to machine precision",
        "A first-order prediction.",
        "model 8f3a",
    ):
        assert said in text
    assert len(page) < 200_000


@pytest.mark.parametrize(
    ("meaning", "heads"),
    [
        ({"change": False, "helpful": 0}, ["Largest", "Smallest"]),
        ({"change": True, "helpful": 0}, ["Removal raises most", "Removal lowers most"]),
    ],
)
def test_nothing_is_called_helpful_where_nothing_says_so(meaning, heads):
    model = {**a_model(), **meaning, "sentence": "", "evidence": None}
    model["queries"][0]["measure"] = None if not meaning["change"] else 2.5
    elements = Elements(render(a_summary(model)))
    assert [elements.text.count(f"{head} in nats") for head in heads] == [2, 2]
    for said in ("helpful", "harmful", "removing one", "for and against"):
        assert said not in elements.text
    assert ("loss 2.50 nats" in elements.text) == meaning["change"]
    assert not [a for tag, a in elements.tags if a.get("class") in ("side helpful", "side harmful")]


def test_what_retraining_found_is_shown_and_decides():
    part = retrained()
    model = {**a_model(), "retrained": part, "evidence": None}
    page = render(a_summary(model))
    text = Elements(page).text
    for said in (
        part["verdict"]["sentence"],
        "122 models were trained again without random halves of the data; the answer is given on "
        "average over trainings.",
        "On average over trainings without random halves of the data: 60 trials, 1 failed",
        "This model without",
        "0.610 [0.560, 0.660]",
        "0.390 [0.340, 0.440]",
        "best possible 0.840 [0.810, 0.870]",
        "bm25",
        "120 of 240 points are drawn",
    ):
        assert said in text
    assert "Not checked" not in text
    assert text.count("Trust the ranking") == 2
    assert page.count('class="scatter ladder"') == 2
    both = render(a_summary({**a_model(), "retrained": part}))
    assert "refits to machine precision" in both
    tags = Elements(both).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert render(a_summary({**model, "retrained": None})) != page


@pytest.mark.parametrize(
    ("grade", "word"), [("good", "Good"), ("not", "Do not rely on it"), ("unknown", "Cannot tell")]
)
def test_the_grade_of_retraining_is_that_of_its_verdict(grade, word):
    part = retrained()
    part["verdict"]["grade"] = grade
    found = verdict({"retrained": part, "coverage": 0.5})
    assert found.word == word
    assert found.grade == ("unchecked" if grade == "unknown" else grade)
    assert found.headline == part["verdict"]["sentence"]
    assert "50 %" in found.notes[0]


def test_what_retraining_found_may_hold_gaps_and_hostile_text():
    part = retrained()
    part["findings"][0]["ratings"][1]["order"] = {"value": None, "interval": [None, None]}
    part["findings"][0]["ratings"][1]["ahead"] = {"value": math.nan, "interval": [None, None]}
    part["points"][0]["y"] = None
    page = render(a_summary({**a_model(), "retrained": part}))
    assert not re.search(r"\b(nan|none|undefined)\b", Elements(page).text.lower())
    model = {**a_model(), "retrained": hostile(retrained())}
    elements = Elements(render(a_summary(model)))
    plain = Elements(render(a_summary({**a_model(), "retrained": retrained()})))
    assert {tag for tag, _ in elements.tags} <= {tag for tag, _ in plain.tags}
    assert not [attrs for _, attrs in elements.tags if any(key.startswith("on") for key in attrs)]
    del part["cost"]
    with pytest.raises(InputError, match="cost"):
        render(a_summary({**a_model(), "retrained": part}))


def test_what_is_absent_leaves_no_trace():
    model = {**a_model(pictured=False), "suspects": None, "queries": [], "worst_residual": None}
    del model["evidence"]
    summary = a_summary(model)
    del summary["identity"]
    elements = Elements(render(summary))
    assert "Suspicious labels" not in elements.text
    assert "Explained queries" not in elements.text
    assert "Identity" not in elements.text
    assert "Not checked" in elements.text
    assert not [tag for tag, _ in elements.tags if tag == "img"]
    assert "holds no model" in Elements(render({**summary, "models": []})).text


def test_rows_without_optional_parts():
    model = a_model(pictured=False)
    model["suspects"] = {"rows": [{"id": 1, "self_influence": 0.5, "loss": 1.0, "given": "a"}]}
    model["queries"][0]["helpful"] = []
    model["evidence"]["truth"] = None
    text = Elements(render(a_summary(model))).text
    assert "Model says" not in text
    assert "Margin" not in text
    assert "None." in text


@pytest.mark.parametrize("pictured", [True, False])
@pytest.mark.parametrize(
    ("count", "heading"), [(0, "Most influential on themselves"), (2, "Suspicious labels")]
)
def test_labels_that_differ_are_marked_and_counted(pictured, count, heading):
    model = a_model(pictured=pictured)
    model["suspects"]["differing"] = {"count": count, "of": 1700}
    for place, row in enumerate(model["suspects"]["rows"]):
        row["issue"] = place < count
    page = render(a_summary(model))
    text = Elements(page).text
    assert f"{count} of 1,700 labels differ from what the model says." in text
    assert ("Suspicious labels" in text) == (heading == "Suspicious labels")
    assert heading in text
    table = page.partition('<table class="ranking')[2].partition("</table>")[0]
    assert "Differs" in table
    rows = [Elements(row).text for row in table.split("<tr")[2:]]
    assert ["5 3 yes" in row for row in rows] == [place < count for place in range(len(rows))]
    assert page.count('class="label differs"') == count * pictured


def test_losses_are_not_given_the_unit_of_another_measure():
    model = {**a_model(pictured=False), "measure": "margin", "unit": "logits"}
    table = render(a_summary(model)).partition('<table class="ranking')[2].partition("</thead>")[0]
    assert "logits" not in table
    model["suspects"]["unit"] = "nats"
    table = render(a_summary(model)).partition('<table class="ranking')[2].partition("</thead>")[0]
    assert table.count("nats") == 2


@pytest.mark.parametrize("pictured", [True, False])
def test_hostile_text_stays_text(pictured):
    summary = hostile(a_summary(a_model(pictured=pictured)))
    summary["models"][0]["queries"][0]["id"] = HOSTILE
    page = render(summary)
    elements = Elements(page)
    assert HOSTILE.partition("<!--")[0] in elements.text
    plain = Elements(render(a_summary(a_model(pictured=pictured))))
    assert {tag for tag, _ in elements.tags} <= {tag for tag, _ in plain.tags}
    assert not [attrs for _, attrs in elements.tags if any(key.startswith("on") for key in attrs)]
    assert page.count("<script") == 2
    assert embedded(page)["title"] == HOSTILE


def test_the_summary_travels_without_pictures_and_without_nan():
    summary = a_summary()
    summary["models"][0]["evidence"]["agreements"][0]["r"] = math.nan
    summary["models"][0]["evidence"]["points"][0]["y"] = math.inf
    summary["models"][0]["queries"][0]["measure"] = -math.inf
    page = render(summary)
    found = embedded(page)
    assert not re.search(r"\b(nan|inf|none|undefined)\b", Elements(page).text.lower())
    expected = copy.deepcopy(summary["models"][0])
    expected["evidence"]["agreements"][0]["r"] = None
    expected["evidence"]["points"][0]["y"] = None
    expected["queries"][0]["measure"] = None
    assert found["models"][0]["evidence"] == expected["evidence"]
    assert found["models"][0]["queries"][0]["measure"] is None
    assert found["models"][0]["queries"][0]["picture"] is None


def test_rendering_is_deterministic_and_leaves_the_summary_alone():
    summary = a_summary()
    before = copy.deepcopy(summary)
    assert render(summary) == render(summary)
    assert summary == before


@pytest.mark.parametrize("name", ["title", "created", "version", "models"])
def test_a_summary_without_its_parts_is_refused(name):
    summary = a_summary()
    del summary[name]
    with pytest.raises(InputError, match=name):
        render(summary)


@pytest.mark.parametrize("name", ["unit", "queries", "sentence"])
def test_a_model_without_its_parts_is_refused(name):
    model = a_model()
    del model[name]
    with pytest.raises(InputError, match=name):
        render(a_summary(model))


def test_a_picture_that_would_be_fetched_is_refused():
    model = a_model()
    model["queries"][0]["picture"] = "https://example.org/a.png"
    with pytest.raises(InputError, match="data URI"):
        render(a_summary(model))


def test_ids_in_the_page_are_unique_and_links_lead_somewhere():
    tags = Elements(render(a_summary(a_model(), a_model("network")))).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in tags:
        if tag == "a":
            assert attrs["href"].removeprefix("#") in ids
        for name in attrs.get("aria-labelledby", "").split():
            assert name in ids
        if tag == "img":
            assert attrs["alt"]

"""The page by itself: what it escapes, and that it draws whatever figures there are."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from invented import accuracy, group, hostile, model, report
from markup import parse
from playwright.sync_api import Browser, sync_playwright

from trimrt.report.page import confusion, count, megabytes, milliseconds, percent, render
from trimrt.report.results import Agreement

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_names_stay_text() -> None:
    text = "<script>alert(1)</script></style></title>\"><img src=x onerror=alert(1)>'`&lt;$\\frac{1}{0}$名\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the measuring font lacks is nobody's business
        page = parse(render(hostile(text)))
    elements = page.everything()
    assert not {element.tag for element in elements} & {"script", "img", "link", "iframe", "object"}
    assert not [element for element in elements for name in element.attributes if name.startswith("on")]
    assert " ".join(text.split()) in page.find("table")[0].words
    shortened = [svg for svg in page.find("svg") if text[:8] in svg.words]
    assert len(shortened) >= 3, "plots name classes and layers"


@pytest.mark.parametrize(
    "models",
    [
        pytest.param([model(number, accuracy=accuracy(0, 9), size_bytes=9) for number in (1, 2)], id="equal"),
        pytest.param([model(1, accuracy=accuracy(1, 1))], id="one image, wrong"),
        pytest.param([model(1, accuracy=accuracy(9, 9)), model(2, accuracy=accuracy(0, 9))], id="extremes"),
    ],
)
def test_any_accuracies_are_drawn(models: list) -> None:
    scored = models[0].accuracy
    images = scored.images
    page = parse(render(report(models, [group(images=images)])))
    for figure in page.find("figure")[:2]:
        words = figure.find("svg")[0].words
        assert "test accuracy" in words
        assert all(str(each.number) in words.split() for each in models)
        assert "nan" not in words


def test_an_accuracy_axis_tells_apart_what_is_nearly_right() -> None:
    models = [model(number, accuracy=accuracy(25 + number, 10_000)) for number in range(1, 5)]
    svg = parse(render(report(models, [group(images=10_000)]))).find("figure")[0].find("svg")[0]
    ticks = re.findall(r"(\d+\.?\d*)\s%", svg.words)
    assert len(set(ticks)) == len(ticks) >= 3
    assert min(map(float, ticks)) >= 99.5


def test_networks_that_one_student_was_pruned_to_by_budgets_are_joined() -> None:
    preset, int8 = model(4), model(5, precision="int8", front="a student's hash")
    joined, scattered = (
        parse(render(report([*(model(number, front=front) for number in (1, 2, 3)), preset, int8])))
        for front in ("a student's hash", None)
    )
    for with_line, without in zip(joined.find("figure")[:2], scattered.find("figure")[:2], strict=True):
        assert "Solid: one student pruned to several budgets (#1, #2, #3)." in with_line.words
        assert "Solid" not in without.words
        assert len(with_line.find("path")) == len(without.find("path")) + 1


def test_many_classes_are_cut_to_those_that_are_mistaken() -> None:
    classes = group(classes=100, images=1000, labels=[f"class-{index}" for index in range(100)])
    better, worse = accuracy(30, 1000, 100), accuracy(60, 1000, 100)
    models = [
        model(1, accuracy=better),
        model(2, accuracy=worse, agreement=Agreement(reference=1, share=0.97)),
    ]
    page = parse(render(report(models, [classes])))
    text = page.words
    assert "Of 100 classes, the 20 with the most mistakes" in text
    assert "12 classes of 100 that change most" in text
    matrix = page.find("figure")[2].find("svg")[0]
    assert "other" in matrix.words.split()


def test_models_that_make_the_same_mistakes_share_a_matrix() -> None:
    same = accuracy(3, 360)
    page = parse(render(report([model(1, accuracy=same), model(2, accuracy=same), model(3)])))
    captions = [figure.find("figcaption")[0].words for figure in page.find("figure")]
    matrices = [caption for caption in captions if "wrong of 360" in caption]
    assert [re.findall(r"#\d", caption) for caption in matrices] == [["#1", "#2", "#3"]]


def test_the_matrix_adds_up() -> None:
    scored = accuracy(5, 360)
    matrix = confusion(scored, group().class_images)
    assert matrix.sum() == 360
    assert matrix.trace() == 355
    assert matrix[0, 1] == 1


def test_data_sets_are_reported_on_apart() -> None:
    models = [model(1), model(2, group=1, accuracy=accuracy(1, 100))]
    page = parse(render(report(models, [group(), group(name="photos", images=100)])))
    summaries = [table for table in page.find("table") if "summary" in (table.attributes.get("class") or "")]
    assert ["model-1" in table.words for table in summaries] == [True, False]
    assert [title.words for title in page.find("h2")][:2] == ["digits", "photos"]


def test_the_page_is_the_same_every_time() -> None:
    assert render(report([model(1)])) == render(report([model(1)]))


def test_figures_are_written_as_people_read_them() -> None:
    written = [
        percent(0.99722),
        count(23_520_842),
        count(4_089_000_000),
        megabytes(2_806_000),
        milliseconds(0.1372),
    ]
    assert [text.replace("\xa0", " ") for text in written] == [
        "99.72 %",
        "23.52 M",
        "4.09 G",
        "2.81 MB",
        "0.137 ms",
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_it_fits_a_telephone_and_asks_the_network_for_nothing(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    names = hostile("a-rather-long-name-of-an-engine-int8-dynamic-openvino-" * 2)
    path.write_text(render(names), encoding="utf-8")
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert asked == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    inner = "[...document.querySelectorAll('.scroll')].map((part) => part.scrollWidth - part.clientWidth)"
    assert max(page.evaluate(inner)) <= 0
    assert page.evaluate("[...document.querySelectorAll('td')].some((cell) => cell.checkVisibility())")
    scales = page.evaluate(
        """[...document.querySelectorAll('figure > svg')]
            .map((svg) => svg.clientWidth / svg.viewBox.baseVal.width)"""
    )
    assert min(scales) >= 0.9, "text in plots would be too small to read"
    context.close()

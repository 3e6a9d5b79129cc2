"""The page, in a real Chromium with no network but the server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright
from pydantic import SecretStr
from running import Running, running, wait_until
from serving import encoded
from tiny_engine import LABELS, write_package

from runtime.drift import CONFIDENCES, LEAST_IMAGES
from runtime.manifest import Predictions
from server.settings import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")

Encode = Callable[..., bytes]

expect.set_options(timeout=60_000)  # a browser on a busy machine takes its time

FRAMES = [encoded(seed, "JPEG", (320, 240), quality=90) for seed in (1, 3)]
"""What the camera sees, each for two seconds."""


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as it:
        yield it


@pytest.fixture(scope="module")
def browser(playwright: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    film = tmp_path_factory.mktemp("film") / "film.mjpeg"
    film.write_bytes(b"".join(FRAMES[number // 60] for number in range(120)))
    flags = [
        "--no-sandbox",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={film}",
        "--use-fake-ui-for-media-stream",
    ]
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
    yield browser
    browser.close()


@pytest.fixture
def served(engine_dir: Path) -> Iterator[Running]:
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0)) as it:
        yield it


@pytest.fixture
def page(browser: Browser, served: Running) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 1080}, permissions=["camera"])
    page = context.new_page()
    complaints: list[str] = []
    foreign: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((served.url, "blob:")) else foreign.append(request.url)
        ),
    )
    page.goto(served.url)
    expect(page.locator("#status")).to_have_text("ready")
    yield page
    context.close()
    assert complaints == []
    assert foreign == [], "the page must work offline"


@pytest.fixture
def photo(tmp_path: Path, encode: Encode) -> Path:
    path = tmp_path / "blocks.png"
    path.write_bytes(encode(1, "PNG", (480, 360)))
    return path


def test_an_image_is_picked_and_its_labels_and_stages_shown(page: Page, photo: Path, served: Running) -> None:
    best = served.predict(photo.read_bytes()).json()["results"][0]["predictions"]
    page.set_input_files("#file", photo)  # after that answer, or the two could share a batch
    rows = page.locator("#labels li")
    expect(rows).to_have_count(5)
    expect(rows.first.locator(".name")).to_have_text(best[0]["label"])
    expect(rows.first).to_contain_text(f"{best[0]['probability'] * 100:.1f} %")
    expect(page.locator("#answered-by")).to_have_text("tiny · fp32 · openvino")
    expect(page.locator("#legend li")).to_have_count(4)
    expect(page.locator("#stages")).to_have_attribute(
        "aria-label", re.compile(r"decode [\d.]+ ms.*inference")
    )
    expect(page.locator("#rode")).to_have_text("It rode alone.")
    expect(page.locator("#preview")).to_have_attribute("alt", "The chosen image, blocks.png")


def test_an_image_is_dropped_and_pasted(page: Page, encode: Encode) -> None:
    for event, property in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([event, property, bytes]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], `${event}.png`, {type: "image/png"}));
                const happened = new Event(event, {bubbles: true, cancelable: true});
                happened[property] = transfer;
                document.body.dispatchEvent(happened);
            }""",
            [event, property, list(encode(3))],
        )
        expect(page.locator("#filename")).to_contain_text("drop.png" if event == "drop" else "pasted image")
        expect(page.locator("#labels li")).to_have_count(5)


def test_a_photograph_is_taken(page: Page) -> None:
    page.click("#camera")
    expect(page.locator("#video")).to_be_visible()
    page.click("#shoot")
    expect(page.locator("#filename")).to_contain_text("photograph.jpg")
    expect(page.locator("#labels li")).to_have_count(5)
    expect(page.locator("#video")).to_be_hidden()


def _best(served: Running, frame: bytes, **params: str) -> str:
    return served.predict(frame, params=params).json()["results"][0]["predictions"][0]["label"]


def test_live_labels_are_shown_over_the_cameras_picture(page: Page, served: Running) -> None:
    page.click("#camera")
    page.click("#live")
    expect(page.locator("#live")).to_have_text("Stop live")
    for frame in FRAMES:
        expect(page.locator("#overlay li").first).to_contain_text(_best(served, frame))
        expect(page.locator("#spoken")).to_contain_text(_best(served, frame))
    expect(page.locator("#figures")).to_have_text(
        re.compile(r"^[1-9]\d* frames/s · [\d.]+ ms · \d+ left out$")
    )
    expect(page.locator("#labels li")).to_have_count(5)
    page.click("#live")
    expect(page.locator("#overlay")).to_be_hidden()
    wait_until(lambda: served.service.telemetry.in_flight == 0)
    assert not [key for key in served.service.telemetry.requests if key.outcome == "failed"]
    page.click("#camera")
    expect(page.locator("#view")).to_be_hidden()


def test_one_of_several_cameras_is_chosen(playwright: Playwright, served: Running) -> None:
    chosen = "document.querySelector('video').srcObject.getVideoTracks()[0].getSettings().deviceId"
    flags = [
        "--no-sandbox",
        "--use-fake-device-for-media-stream=device-count=2",
        "--use-fake-ui-for-media-stream",
    ]
    with closing(playwright.chromium.launch(executable_path=CHROMIUM, args=flags)) as browser:
        page = browser.new_page(permissions=["camera"])
        page.goto(served.url)
        page.click("#camera")
        page.click("#live")
        expect(page.locator("#overlay li")).to_have_count(3)
        first = page.evaluate(chosen)
        (other,) = {it.get_attribute("value") for it in page.locator("#device option").all()} - {first}
        page.select_option("#device", other)
        wait_until(lambda: page.evaluate(chosen) == other)
        page.locator("#overlay").evaluate("(overlay) => overlay.replaceChildren()")
        expect(page.locator("#overlay li")).to_have_count(3)


def test_live_video_asks_the_chosen_engine(page: Page, served: Running) -> None:
    page.click("#camera")
    page.click("#live")
    expect(page.locator("#answered-by")).to_contain_text("tiny")
    page.select_option("#engine", "other")
    expect(page.locator("#answered-by")).to_contain_text("other")
    for frame in FRAMES:
        expect(page.locator("#overlay li").first).to_contain_text(_best(served, frame, engine="other"))


def test_a_stream_that_ends_says_why(page: Page, served: Running) -> None:
    page.click("#camera")
    page.click("#live")
    expect(page.locator("#overlay li")).to_have_count(3)
    served.service.lifecycle.refusing = True
    expect(page.get_by_role("alert")).to_have_text("The stream has ended: the server is draining")
    expect(page.locator("#live")).to_have_text("Start live")
    served.service.lifecycle.refusing = False
    page.click("#live")
    expect(page.locator("#overlay li")).to_have_count(3)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_engine_is_switched_and_loaded_if_need_be(page: Page, photo: Path, served: Running) -> None:
    page.set_input_files("#file", photo)
    expect(page.locator("#answered-by")).to_contain_text("tiny")
    assert "not loaded" in page.locator("#engine option[value=other]").inner_text()
    page.select_option("#engine", "other")
    expect(page.locator("#answered-by")).to_have_text("other · fp16 · openvino")
    best = served.predict(photo.read_bytes(), params={"engine": "other"}).json()["results"][0]["predictions"][
        0
    ]
    expect(page.locator("#labels li").first).to_contain_text(best["label"])
    assert "not loaded" not in page.locator("#engine option[value=other]").inner_text()


def test_an_error_is_shown_and_the_next_image_answered(page: Page, photo: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is no image")
    page.set_input_files("#file", broken)
    expect(page.get_by_role("alert")).to_contain_text("Not an image, or a damaged one")
    expect(page.locator("#labels li")).to_have_count(0)
    page.set_input_files("#file", photo)
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#labels li")).to_have_count(5)


def test_load_is_sent_and_the_pulse_drawn(page: Page, photo: Path) -> None:
    page.click("#send")
    expect(page.locator("#load-result")).to_have_text("Choose an image first.")
    page.set_input_files("#file", photo)
    page.fill("#count", "60")
    page.fill("#concurrency", "4")
    page.click("#send")
    expect(page.locator("#load-result")).to_contain_text(
        re.compile(r"60 answered in .* a second, median .* ms, 99th percentile .* ms\.$")
    )
    expect(page.locator("#p99")).to_contain_text("ms")
    expect(page.locator("#chart")).to_have_attribute("aria-label", re.compile(r"median [\d.]+ ms"))
    expect(page.locator("#chart path.p99")).to_have_attribute("d", re.compile(r"^M[\d.]+ [\d.]+L"))


def test_the_cache_and_drift_are_shown(browser: Browser, tmp_path: Path, photo: Path) -> None:
    expected = Predictions(
        classes=[1000] + [0] * (len(LABELS) - 1), confidence=[1000] + [0] * len(CONFIDENCES)
    )
    write_package(tmp_path, predictions=expected)
    with (
        running(Settings(engine="tiny", engine_dir=tmp_path, port=0, cache_mib=1)) as served,
        closing(browser.new_context()) as context,
    ):
        page = context.new_page()
        page.goto(served.url)
        page.set_input_files("#file", photo)
        expect(page.locator("#rode")).to_have_text("It rode alone.")
        page.click("#again")
        expect(page.locator("#rode")).to_have_text("It was answered from the cache.")
        expect(page.locator("#cached")).to_contain_text("50 %")
        expect(page.locator("#drift")).to_be_hidden()
        for _ in range(LEAST_IMAGES):
            served.predict(photo.read_bytes())
        expect(page.locator("#drift dd")).to_have_text(re.compile(r"^\d+\.\d\d, other images$"))
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert _contrast(page, "#drift dd") >= 4.5
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_a_cache_or_expectations_neither_is_shown(page: Page, photo: Path) -> None:
    page.set_input_files("#file", photo)
    expect(page.locator("#p50")).to_contain_text("ms")
    for figure in ("#cached", "#drift"):
        expect(page.locator(figure)).to_be_hidden()


def test_where_browsers_give_no_camera_the_page_says_so(playwright: Playwright, served: Running) -> None:
    flags = ["--no-sandbox", "--host-resolver-rules=MAP camera.test 127.0.0.1"]
    with closing(playwright.chromium.launch(executable_path=CHROMIUM, args=flags)) as browser:
        page = browser.new_page()
        page.goto(served.url.replace("127.0.0.1", "camera.test"))
        expect(page.locator("#no-camera")).to_be_visible()
        expect(page.locator("#camera")).to_be_hidden()


def test_live_video_is_used_by_keyboard(page: Page) -> None:
    page.focus("#camera")
    page.keyboard.press("Enter")
    expect(page.locator("#live")).to_be_visible()
    for wanted in ("live", "shoot"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == wanted
    page.focus("#live")
    page.keyboard.press("Space")
    expect(page.get_by_role("status").filter(has_text="%")).to_have_count(1)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert _contrast(page, "#overlay") >= 4.5
    page.keyboard.press("Space")
    expect(page.locator("#overlay")).to_be_hidden()


def test_it_is_used_by_keyboard_and_named_for_screen_readers(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert reached >= {"file", "engine", "theme", "count", "concurrency", "send"}
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, select, progress, [role=img]")]
            .filter((e) => !e.hidden && !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
            .filter((e) => e.checkVisibility()).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("h1, h2, h3").all_inner_texts()[0] == "TrimRT"


def _contrast(page: Page, selector: str) -> float:
    """WCAG 2 contrast of an element's text with the first opaque background behind it."""
    return page.evaluate(
        """(selector) => {
            const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
            const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
                .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const element = document.querySelector(selector);
            let behind = element;
            const back = () => parse(getComputedStyle(behind).backgroundColor);
            while (back().length === 4 && back()[3] === 0) behind = behind.parentElement;
            const both = [parse(getComputedStyle(element).color), back()];
            const [a, b] = both.map(light).sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        }""",
        selector,
    )


def test_light_and_dark_follow_the_system_and_the_button(page: Page) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        expect(page.locator("html")).to_have_attribute("data-theme", scheme)
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in (".muted", "#status", "nav a", "#send", "dt", "#drop-hint"):
            assert _contrast(page, selector) >= 4.5, f"{selector} is hard to read in {scheme}"
    assert backgrounds[0] != backgrounds[1]
    page.click("#theme")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")


def test_it_fits_a_telephone(page: Page, served: Running) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.evaluate(
        "document.querySelector('#engine').options[0].text = 'a-rather-long-name-of-an-engine-int8-openvino'"
    )
    served.client.post("/engines/other/load")
    served.client.put("/engines/other/shadow", json={"of": "tiny"})
    expect(page.locator("#shadow-list li")).to_have_count(1)
    page.click("#camera")
    page.click("#live")
    expect(page.locator("#overlay li")).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    picture, labels = page.locator("#video").bounding_box(), page.locator("#overlay").bounding_box()
    assert picture is not None
    assert labels is not None
    assert picture["x"] <= labels["x"] <= labels["x"] + labels["width"] <= picture["x"] + picture["width"]


def test_labels_cannot_inject_markup(page: Page) -> None:
    assert LABELS  # shown with textContent; the policy is the second line of defence
    response = page.request.get(page.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy


def test_a_shadow_is_compared_and_promoted(page: Page, served: Running, encode: Encode) -> None:
    served.client.post("/engines/other/load")
    served.client.put("/engines/other/shadow", json={"of": "tiny", "share": 1})
    served.predict(encode(1))
    panel = page.get_by_role("region", name="Shadow engines")
    expect(panel.locator("h3")).to_have_text("other beside tiny, on 100 % of its images")
    expect(panel.locator("dd").first).to_have_text("1")
    expect(panel).to_contain_text(re.compile(r"[\d.]+ ms / [\d.]+ ms"))
    panel.get_by_role("button", name="Promote").click()
    expect(panel.get_by_role("status")).to_contain_text("1 images were compared, not 1000")
    counts = served.service.registry.shadows["other"].counts
    counts.compared = counts.agreed = 1000
    panel.get_by_role("button", name="Promote").click()
    expect(panel.get_by_role("status")).to_have_text("other is the default engine.")
    expect(panel.locator("h3")).to_have_count(0)
    assert served.predict(encode(1)).json()["engine"]["name"] == "other"
    expect(page.locator("#engine option[value=other]")).to_have_text("other (default)")


def test_the_interfaces_description_is_shown_without_another_network(page: Page, served: Running) -> None:
    page.goto(f"{served.url}/docs")
    expect(page.locator("#swagger-ui .title")).to_contain_text("TrimRT")
    expect(page.locator("[data-path='/predict']")).to_be_visible()


def test_the_key_is_asked_for_where_there_is_one(browser: Browser, engine_dir: Path, photo: Path) -> None:
    settings = Settings(
        engine="tiny", engine_dir=engine_dir, port=0, api_key=SecretStr("clé"), protect_predict=True
    )
    with running(settings) as locked, closing(browser.new_context()) as context:
        page = context.new_page()
        given = iter(["wrong", "clé"])
        page.on("dialog", lambda dialog: dialog.accept(next(given)))
        page.goto(locked.url)
        page.set_input_files("#file", photo)
        expect(page.locator("#labels li")).to_have_count(5)
        page.select_option("#engine", "other")
        expect(page.locator("#answered-by")).to_contain_text("other")
        locked.service.registry.set_shadow("other", "tiny", 1)
        page.get_by_role("button", name="End other's comparison").click()
        expect(page.locator("#shadow-said")).to_have_text("other is compared no more.")
        page.click("#camera")
        page.click("#live")
        expect(page.locator("#overlay li")).to_have_count(3)
    assert next(given, None) is None

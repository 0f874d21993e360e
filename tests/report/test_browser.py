"""The page in a browser, opened from disk. Needs playwright and a Chromium of the system."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests import report_sample
from vae3d.report import page as report_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
FIREFOX = next(filter(None, map(shutil.which, ("firefox", "firefox-esr"))), None)
OLD_FIREFOX = 153  # the last of which it is known that playwright 1.65 cannot drive it; to find out takes 3 s
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

FLAGS = ["--enable-unsafe-swiftshader", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
READ = """() => Object.fromEntries(
    [...document.querySelectorAll("#chapter-1 .frame")].map((one) => [one.dataset.of, one.toDataURL().split(",")[1]])
)"""


COPIES = """async () => {  // the most by which copied and drawn pixels differ, of all pictures
    const { media, clip } = page.chapters[0].player;
    const panels = clip.panels.filter(({ layer }) => layer === "picture");
    const copies = await media.copy(panels);
    const found = copies.map((copy, index) => {
        const { width, height, of } = panels[index];
        const canvas = [...document.querySelectorAll("#chapter-1 .frame")].find((one) => one.dataset.of === of);
        const drawn = canvas.getContext("2d").getImageData(0, 0, width, height).data;
        const at = (i) => (Math.floor(i / (4 * width)) * copy.width + (Math.floor(i / 4) % width)) * 4 + (i % 4);
        return drawn.reduce((most, value, i) => Math.max(most, Math.abs(value - copy.data[at(i)])), 0);
    });
    return [media.copies, ...found];
}"""


@pytest.fixture(scope="module")
def playwright() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright: Any) -> Iterator[Any]:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """index.html of the sample with its clips beside it, of which one is missing and one damaged."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "SINGLE_FILE_BYTES", 0)
        report_sample.write_sample(folder)
    (folder / "index_clips" / "missing.js").unlink()
    damaged = folder / "index_clips" / "damaged.js"
    damaged.write_text(re.sub("base64,.{2000}", "base64," + "AAAA" * 500, damaged.read_text()))
    return folder / "index.html"


@pytest.fixture
def opened(browser: Any, sample: Path) -> Iterator[Any]:
    """opened(link, **context options) opens the page. No request may leave, and no error may come."""
    contexts, wrong = [], []

    def open_page(link: str = "", path: Path = sample, **options: Any) -> Any:
        context = browser.new_context(
            **{"reduced_motion": "reduce", "viewport": {"width": 1300, "height": 900}, **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or wrong.append(request.url)
        )
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri() + link)
        page.wait_for_selector(".player:not(.loading) .stage > *")
        return page

    open_page.wrong = wrong
    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def pixels(page: Any) -> dict[str, np.ndarray]:
    """Name -> [H, W, 3], of the pictures that are shown."""
    found = page.evaluate(READ)
    decoded = {
        name: cv2.imdecode(np.frombuffer(base64.b64decode(png), np.uint8), cv2.IMREAD_COLOR)
        for name, png in found.items()
    }
    return {name: picture[..., ::-1] for name, picture in decoded.items()}


def number(page: Any) -> int:
    return int(page.locator(".player input[type=number]").first.input_value())


def assert_shows(page: Any, frame: int) -> None:
    """The number is that of the frame, and so become the pixels of all pictures (the number goes ahead of the seek),
    within the error of 4:2:0 and H.264."""
    original = report_sample.video()
    expected = {"original": original, **report_sample.reconstructions(original)}
    assert number(page) == frame

    def wrong() -> dict[str, tuple[float, int]]:
        gaps = {name: np.abs(picture.astype(int) - expected[name][frame]) for name, picture in pixels(page).items()}
        return {name: (gap.mean(), gap.max()) for name, gap in gaps.items() if gap.mean() >= 1.5 or gap.max() >= 12}

    until(lambda: not wrong(), wrong)
    assert number(page) == frame


def until(condition: Callable[[], bool], say: Callable[[], Any] = lambda: None) -> None:
    """Wait for a condition. say: what is told if it does not come."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, say()


def test_frames_are_those_of_the_file(opened):
    page = opened()
    assert_shows(page, 0)
    for key, frame in [
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("Shift+ArrowRight", 11),
        ("ArrowRight", 0),
        ("End", 11),
        ("ArrowLeft", 10),
    ]:
        page.keyboard.press(key)
        assert_shows(page, frame)
    for typed, frame in [("7", 7), ("99", 11), ("", 11), ("-3", 0)]:
        page.get_by_label("Frame number").first.fill(typed)
        page.keyboard.press("Enter")
        assert_shows(page, frame)
    page.locator("#chapter-1 .stage").focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.player').classList.contains('playing')")
    page.wait_for_function("document.querySelector('.player input[type=number]').value >= 3")
    page.get_by_role("button", name="Pause").click()
    page.wait_for_selector(".player:not(.playing)")
    stopped = number(page)
    assert stopped >= 3
    assert_shows(page, stopped)
    copied, *differences = page.evaluate(COPIES)
    assert copied  # without a GPU
    assert len(differences) == 3
    assert max(differences) <= 2
    assert page.locator(".scores").nth(1).inner_text() == page.evaluate(
        """() => {
            const values = [...document.querySelectorAll(".curve .readout")].map((one) => one.children[0].textContent);
            return `PSNR ${values[0]}\\nLPIPS ${values[1]}`;
        }"""
    )


@pytest.mark.skipif(FIREFOX is None, reason="no firefox on the PATH")
def test_firefox_shows_the_same_frames(playwright, sample):
    version = subprocess.run([FIREFOX, "--version"], capture_output=True, text=True, check=True).stdout
    if int(re.search(r"(\d+)\.", version)[1]) <= OLD_FIREFOX:
        pytest.skip(f"playwright cannot drive {version.strip()}")
    wrong = []
    firefox = playwright.firefox.launch(channel="moz-firefox", executable_path=FIREFOX)
    try:
        page = firefox.new_page()
    except sync_api.Error as error:
        firefox.close()
        pytest.skip(f"playwright cannot drive this firefox: {str(error).splitlines()[0]}")
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(sample.as_uri() + "#video=two&frame=7")
    page.wait_for_selector(".player:not(.loading) .frame")
    for key, frame in [("ArrowRight", 8), ("End", 11), ("ArrowLeft", 10)]:
        page.keyboard.press(key)
        assert_shows(page, frame)
    firefox.close()
    assert wrong == []


def test_views_show_the_same_place(opened):
    page = opened("#video=two&frame=7&view=wipe&a=original&b=fine")
    assert number(page) == 7
    viewport = page.locator(".viewport")
    box = viewport.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 30, steps=3)
    page.mouse.up()
    assert 24 <= int(page.get_by_role("slider", name="Where A ends").get_attribute("aria-valuenow")) <= 26
    page.get_by_role("slider", name="Where A ends").press("ArrowRight")
    assert 26 <= int(page.get_by_role("slider", name="Where A ends").get_attribute("aria-valuenow")) <= 28
    assert number(page) == 7

    page.locator("#chapter-1 .stage").focus()
    page.keyboard.press("3")
    stage = page.locator(".stage.blink")
    before = stage.get_attribute("data-shown")
    page.keyboard.press("x")
    assert {before, stage.get_attribute("data-shown")} == {"a", "b"}
    page.locator("#chapter-1").get_by_label("Blink", exact=True).select_option("3")
    page.wait_for_function(f"document.querySelector('.stage').dataset.shown === '{before}'")

    page.keyboard.press("1")
    box = viewport.nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.locator("#chapter-1 .stage").focus()
    page.mouse.wheel(0, -300)
    page.wait_for_function("document.querySelector('.stage').classList.contains('zoomed')")
    transforms = page.locator(".frame").evaluate_all("all => all.map((one) => getComputedStyle(one).transform)")
    assert len(transforms) == 3
    assert len({*transforms}) == 1
    assert transforms[0] != "none"
    page.keyboard.press("g")
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 3)
    places = page.locator(".lens").evaluate_all("all => all.map((one) => one.style.left + one.style.top)")
    assert len({*places}) == 1
    assert places[0]
    assert page.locator(".pixel span").count() >= 4
    page.keyboard.press("e")
    page.keyboard.press("]")
    assert page.locator(".sheet").evaluate_all("all => all.map((one) => one.dataset.layer)") == [
        "picture",
        "error",
        "error",
    ]
    scale = 0.25 / 2
    assert page.locator(".bar .ticks").inner_text().split()[-1] == f"{scale:.4f}"
    page.wait_for_function("location.hash.includes('gain=2') && location.hash.includes('layer=error')")
    link = page.evaluate("location.hash")

    again = opened(link)
    assert again.evaluate("location.hash") == link
    assert number(again) == 7
    again_transform = again.locator(".frame").first.evaluate("one => getComputedStyle(one).transform")
    for left, right in zip(
        *(map(float, re.findall(r"-?[\d.]+", one)) for one in (again_transform, transforms[0])), strict=True
    ):
        assert left == pytest.approx(right, abs=0.1)  # of a link's four digits
    again.locator(".viewport").first.dblclick()
    again.wait_for_selector("#chapter-1 .stage:not(.zoomed)")
    again.get_by_label("Layer of fine").select_option("change")
    assert again.locator(".sheet").evaluate_all("all => all.map((one) => one.dataset.layer)") == [
        "picture",
        "error",
        "change",
    ]
    assert again.locator(".bar-name").all_inner_texts() == ["Error", "Change"]


def test_table_curves_and_histograms_lead_to_videos(opened):
    page = opened()
    chapter = page.locator("#chapter-1")

    def names():
        return chapter.locator(".video-name").all_inner_texts()

    assert names()[0] == "panorama.mp4"
    chapter.get_by_role("button", name="fine ↑").first.click()
    assert chapter.locator("tbody td").first.inner_text() == "20.00"
    chapter.get_by_role("button", name="fine ↑").first.click()
    assert names()[0] == "two.mp4"
    assert names()[-1] == "none.mp4"
    assert chapter.locator("tbody tr", has_text="two.mp4").locator(".badge").all_inner_texts() == ["best"]

    chapter.get_by_label("Filter videos").fill("psnr < 22 .mp4")
    assert len(names()) == 2
    chapter.get_by_label("Filter videos").fill("psnr<22 .mp4")
    assert names() == [report_sample.HOSTILE["markup"], "panorama.mp4"]
    assert chapter.locator(".count").inner_text() == "2 of 10 videos"
    chapter.locator(".open").first.click()
    chapter.locator(".player .name", has_text="<img").wait_for()
    page.keyboard.press("n")
    chapter.locator(".player .name", has_text="panorama.mp4").wait_for()
    page.wait_for_selector(".player:not(.loading) .u-over")

    plot = chapter.locator(".player .u-over").first
    box = plot.bounding_box()
    plot.click(position={"x": box["width"] * 9 / 11, "y": 20})
    assert_shows(page, 9)
    lines = chapter.locator(".player .now").evaluate_all("all => all.map((one) => one.style.left)")
    assert len({*lines}) == 1
    assert abs(float(lines[0][:-1]) - 100 * 9 / 11) < 0.1
    page.keyboard.press("m")
    assert number(page) == 11  # the worst frame of "base"
    chapter.locator(".marks button").first.click()
    assert number(page) == 11

    histogram = chapter.locator("#chapter-1-distributions .u-over").first
    histogram.scroll_into_view_if_needed()
    histogram.click(position={"x": 8, "y": 40})
    assert re.fullmatch(r"psnr<22 \.mp4 psnr=20\.\.22\.5", chapter.get_by_label("Filter videos").input_value())
    chapter.get_by_label("Filter videos").fill("")
    chapter.locator(".forest button").nth(1).click()
    assert chapter.get_by_label("Columns").last.input_value() == "m lpips"


def test_names_of_any_text_stay_text(opened):
    page = opened()
    shown = page.locator("#chapter-1 .video-name").evaluate_all("all => all.map((one) => one.textContent)")
    assert [*report_sample.HOSTILE.values()] == shown[1:6]
    for id, name in report_sample.HOSTILE.items():
        page.locator(f"tr[data-id={id}] button").click()
        page.wait_for_function("([name]) => document.querySelector('.player .name').textContent === name", arg=[name])
        page.wait_for_selector(".player:not(.loading) .frame")
        link = page.locator(".player .files a").first
        assert link.evaluate("one => decodeURIComponent(one.href)").endswith("/ori/" + name)
    assert page.title() == "Sample <b>report</b>"
    assert page.locator("main img[onerror]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_clips_that_do_not_play_say_why(opened):
    page = opened()
    for id, message in [
        ("missing", "index_clips/missing.js is missing"),
        ("damaged", "damaged"),
        ("none", "another size"),
    ]:
        page.locator(f"tr[data-id={id}] button").click()
        page.locator(".missing[role=alert]", has_text=message).wait_for()
        assert page.locator(".player").first.locator("canvas").count() == 0
    page.locator("tr[data-id=two] button").click()
    page.wait_for_selector(".player:not(.loading) .frame")
    assert_shows(page, 0)
    # The browser itself reports the missing file.
    assert all("ERR_FILE_NOT_FOUND" in text for text in opened.wrong)
    opened.wrong.clear()


def test_panorama_turns_in_all_views(opened):
    page = opened("#video=panorama&frame=4&view=panorama")
    sphere = page.locator(".sphere canvas").first

    def seen() -> list[np.ndarray]:
        shots = [one.screenshot() for one in page.locator(".sphere").all()]
        return [cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR).astype(int) for shot in shots]

    until(lambda: all(picture.std() > 5 for picture in seen()))  # drawn
    before = seen()
    box = sphere.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 100, steps=3)
    page.mouse.up()
    assert len(before) == 3
    until(lambda: all(np.abs(left - right).mean() > 2 for left, right in zip(before, seen(), strict=True)))
    page.wait_for_function("/turn=[^0]/.test(location.hash)")


def test_one_file_narrow_themes_and_help(opened, tmp_path):
    report_sample.write_sample(tmp_path)
    assert not (tmp_path / "index_clips").exists()
    page = opened(path=tmp_path / "index.html", viewport={"width": 360, "height": 700}, color_scheme="dark")
    assert_shows(page, 0)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("innerWidth") == 360
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.get_by_role("button", name="Dark or light").click()
    light = page.evaluate(colour)
    assert sum(map(int, re.findall(r"\d+", dark))) < 200 < 600 < sum(map(int, re.findall(r"\d+", light)))
    page.keyboard.press("?")
    assert page.locator("dialog#help[open]").is_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Open photo.png").click()
    page.wait_for_selector("#chapter-2 .player:not(.loading) .frame")
    assert page.locator("#chapter-2 .curve .readout").count() == 0  # of a single frame
    assert page.locator("#chapter-1 .frame").count() == 0  # one clip at a time
    assert page.locator("#chapter-2 .player .curve").count() == 0  # an image has no curves over frames
    assert "psnr" in page.locator("#chapter-2 .player").inner_text().lower()
    assert not page.get_by_text("Warning 3 of the page.").is_visible()
    page.get_by_text("4 warnings").click()
    assert page.get_by_text("Warning 3 of the page.").is_visible()
    unnamed = page.locator("button, input, select, a").evaluate_all(
        "all => all.filter((one) => !(one.textContent.trim() || one.getAttribute('aria-label'))).length"
    )
    assert unnamed == 0

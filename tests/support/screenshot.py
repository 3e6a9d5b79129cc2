"""The README's picture of the page: `python tests/support/screenshot.py URL IMAGE OUTPUT.png`."""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import sync_playwright


def main(url: str, image: str, output: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1100}, color_scheme="light")
        page.goto(url)
        page.wait_for_selector("#status.good")
        page.set_input_files("#file", image)
        page.wait_for_selector("#labels li")
        for count, concurrency in ((300, 1), (600, 4), (900, 6), (300, 2)):
            page.fill("#count", str(count))
            page.fill("#concurrency", str(concurrency))
            page.click("#send")
            page.wait_for_selector("#load-result:not(:empty)", timeout=120_000)
        page.click("#again")
        page.wait_for_timeout(1500)
        page.screenshot(path=output, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The page in a real browser: `make test-page`. Needs chromium, chromium-driver and selenium.

LATENT_REASONING_PAGE names another page, and LATENT_REASONING_SCREENSHOTS a folder that keeps
the pictures.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program, driver = next(filter(None, programs), None), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium or chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def file(request):
    named = os.environ.get("LATENT_REASONING_PAGE")
    if named and not Path(named).is_file():
        pytest.fail(f"LATENT_REASONING_PAGE: no file {named}")
    return Path(named).resolve() if named else request.getfixturevalue("page")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    named = os.environ.get("LATENT_REASONING_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_reads_at_this_width_and_its_examples_can_be_browsed(
    browser, file, pictures, width
):
    # A window is never narrower than 500 pixels; the device's metrics are.
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(file.as_uri())
    find = browser.find_elements
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert find("css selector", "figure img")
    loaded = "return [...document.images].every(i => i.complete && i.naturalWidth > 100)"
    assert browser.execute_script(loaded)
    size = "return parseFloat(getComputedStyle(document.body).fontSize)"
    assert browser.execute_script(size) >= 14
    boxes = find("css selector", ".example")
    assert boxes or "Reading the latents" not in browser.page_source  # a plain model has none
    for index, box in enumerate(boxes):
        _browse(browser, box)
        browser.execute_script("arguments[0].scrollIntoView()", box)
        browser.save_screenshot(f"{pictures / f'example-{index}-{width}.png'}")
    browser.execute_script("window.scrollTo(0, 0)")
    browser.save_screenshot(f"{pictures / f'top-{width}.png'}")
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not complaints
    requests = [
        e["message"] for e in browser.get_log("performance") if "requestWillBeSent" in e["message"]
    ]
    assert not [message for message in requests if '"url":"http' in message]


def _browse(browser, box) -> None:
    """Click through all rows of an example view, and back."""
    options = box.find_elements("css selector", "option")
    after, before = (box.find_element("css selector", name) for name in (".next", ".before"))
    shown = box.find_element("css selector", ".shown")
    seen = [shown.text]
    for _ in options[1:]:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", after)
        after.click()
        seen.append(shown.text)
    assert len(set(seen)) > len(options) // 2
    assert len(box.find_elements("css selector", ".shown table")) == 2
    after.click()
    assert shown.text == seen[0]
    before.click()
    assert shown.text == seen[-1]
    options[1].click()
    assert shown.text == seen[1]

"""Opens a page in headless Chromium, as a reader does. All requests come from the page, none from Chromium itself."""

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
#: Makes a file from base64 and drops the file on the page's field for pictures.
DROP = """
const [name, type, content] = arguments;
const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], name, { type }));
document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
"""


@contextmanager
def chromium(folder: Path) -> Iterator[Any]:
    """A driver of Chromium with its profile in ``folder``. Skips the test if Chromium is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is for tests of pages only")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


def drop(driver: Any, name: str, kind: str, content: bytes) -> None:
    """Drop a file on the page."""
    driver.execute_script(DROP, name, kind, base64.b64encode(content).decode())

"""Takes the pictures of the chat page and of this site in docs/images, in headless Chromium.

python docs/screenshots.py [FOLDER]
"""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from browser import browser  # noqa: E402
from selenium.webdriver.chrome.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from server_process import running_server  # noqa: E402

DARK = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
DESKTOP, PHONE = (1280, 800), (390, 844)


def ask(driver: WebDriver, text: str) -> None:
    """Send a message and wait for the whole answer."""
    driver.find_element(By.CSS_SELECTOR, ".composer textarea").send_keys(text, Keys.ENTER)
    time.sleep(0.5)
    while driver.find_elements(By.CSS_SELECTOR, "[aria-busy=true]"):
        time.sleep(0.1)
    driver.execute_script("document.activeElement.blur()")
    time.sleep(0.5)


def show_server(driver: WebDriver, seconds: float) -> None:
    """Look at the second tab for a while."""
    driver.find_elements(By.CSS_SELECTOR, "[role=tab]")[1].click()
    time.sleep(seconds)


def traffic(url: str, stop: threading.Event) -> None:
    """One client that asks until told to stop."""
    while not stop.is_set():
        body = {"messages": [{"role": "user", "content": "解析三首李白的诗"}], "max_tokens": 200}
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        stop.wait(3)


def take(url: str, folder: Path, profiles: Path) -> None:
    """All pictures."""

    def save(driver: WebDriver, name: str) -> None:
        driver.save_screenshot(str(folder / f"{name}.png"))
        print(folder / f"{name}.png")

    with browser(profiles / "desktop", DESKTOP) as driver:
        driver.get(url)
        time.sleep(2)
        save(driver, "page-welcome")
        ask(driver, "解析三首李白的诗")
        ask(driver, "What is a gourd?")
        save(driver, "page-chat")
        stop = threading.Event()
        clients = [threading.Thread(target=traffic, args=(url, stop)) for _ in range(3)]
        for client in clients:
            client.start()
        show_server(driver, 45)
        save(driver, "page-server")
        stop.set()
        for client in clients:
            client.join()
    with browser(profiles / "dark", DESKTOP) as driver:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", DARK)
        driver.get(url)
        time.sleep(2)
        ask(driver, "解析三首李白的诗")
        save(driver, "page-dark")
    with browser(profiles / "phone", PHONE, "zh-CN") as driver:
        driver.get(url)
        time.sleep(2)
        save(driver, "page-phone-chinese")
        ask(driver, "解析三首李白的诗")
        save(driver, "page-phone-chat")
    with browser(profiles / "api", DESKTOP) as driver:
        driver.get(f"{url}/docs")
        time.sleep(4)
        save(driver, "page-api")


def take_site(folder: Path, scratch: Path) -> None:
    """A picture of this documentation as a site."""
    site = scratch / "site"
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site),
         "--config-file", "deploy/site/mkdocs.yml"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browser(scratch / "reader", DESKTOP) as driver:
            driver.get(f"http://127.0.0.1:{server.server_address[1]}/how_it_works.html")
            time.sleep(3)
            driver.save_screenshot(str(folder / "site-how-it-works.png"))
            print(folder / "site-how-it-works.png")
        server.shutdown()


def main() -> None:
    """Serve the demo model and take every picture."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ("--max-model-len", "2048", "--num-gpu-blocks-override", "256")
    with tempfile.TemporaryDirectory() as scratch, running_server(Path(scratch), flags) as server:
        take_site(folder, Path(scratch))
        take(server.url, folder, Path(scratch))


if __name__ == "__main__":
    main()

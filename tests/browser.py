"""Pages in headless Chromium, where there is one."""

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import pytest

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None
)
CHROMEDRIVER = shutil.which("chromedriver")


class Browser:
    """Headless Chromium through the WebDriver protocol on localhost, with the standard library alone."""

    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.root = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.session = None
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder}"]
        options = {"binary": CHROMIUM, "args": flags}
        wanted = {
            "capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        }
        try:
            for _ in range(100):
                with contextlib.suppress(urllib.error.URLError):
                    self.ask("GET", "/status")
                    break
                time.sleep(0.1)
            else:
                pytest.skip("chromedriver does not answer")
            self.session = self.ask("POST", "/session", wanted)["sessionId"]
        except BaseException:
            self.close()
            raise

    def ask(self, method, path, body=None):
        if self.session and path != "/status":
            path = f"/session/{self.session}{path}"
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address):
        self.ask("POST", "/url", {"url": address})

    def overflow(self):
        """By how many pixels the page is wider than its window."""
        return self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def run(self, script, *arguments):
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script, seconds=10):
        """What a script gives as soon as that is neither nothing nor zero."""
        for _ in range(10 * seconds):
            if value := self.run(script):
                return value
            time.sleep(0.1)
        return self.run(script)

    def resize(self, width, height):
        # a headless window is not narrower than 500 pixels; the device that it plays may be
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def command(self, name, **params):
        return self.ask("POST", "/goog/cdp/execute", {"cmd": name, "params": params})

    def errors(self):
        return [e for e in self.ask("POST", "/se/log", {"type": "browser"}) if e["level"] == "SEVERE"]

    def close(self):
        if self.session:
            with contextlib.suppress(OSError):
                self.ask("DELETE", "")
        self.process.terminate()
        self.process.wait(10)


@contextlib.contextmanager
def browsing():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("no chromium and chromedriver here: the page is not tested in a browser")
    with browsing() as one:
        yield one


def overflow(page, width):
    """By how many pixels a file is wider than a window; 0 where there is no browser."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        return 0
    with browsing() as browser:
        browser.resize(width, 900)
        browser.open(page.as_uri())
        return browser.overflow()

"""The page of a served model, used as a visitor does, in headless Chromium."""

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from endpoints import ask, serving
from websockets.sync.client import ClientConnection, connect

from raychat.data.tokenizer import Tokenizer
from raychat.on_ray.endpoint import PAGE, Access

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY_SHA256 = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"  # of the word `key`


class Browser:
    """A page in Chromium, by its DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._ids = socket, itertools.count()
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """The result of a command; what the console says in between is noted."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def js(self, expression: str):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str):
        """Wait until an expression is true."""
        deadline = time.monotonic() + 20
        while not self.js(expression):
            assert time.monotonic() < deadline, (expression, self.js("document.body.innerText"), self.problems)
            time.sleep(0.02)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """A key of the keyboard."""
        for kind in ("rawKeyDown", "keyUp"):
            code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=2 if ctrl else 0
            )

    def open(self, port: int) -> None:
        """Show the page of a server."""
        self.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        self.until("document.readyState === 'complete' && !!document.getElementById('status')")

    def screenshot(self, name: str) -> None:
        """A picture in the folder that RAYCHAT_SCREENSHOTS names, if it does."""
        if folder := os.environ.get("RAYCHAT_SCREENSHOTS"):
            image = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(image))


@pytest.fixture(scope="module")
def tokenizer(prepared_base):
    (folder,) = (prepared_base / "tokenizers").iterdir()
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here")
    profile = tmp_path_factory.mktemp("profile")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-sync"
    process = subprocess.Popen(
        [CHROMIUM, *flags.split(), "--window-size=1000,900", "--remote-debugging-port=0", f"--user-data-dir={profile}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline, port_file = time.monotonic() + 30, profile / "DevToolsActivePort"
        while not port_file.exists() or len(port_file.read_text().splitlines()) < 2:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip("Chromium does not start here")
            time.sleep(0.05)
        targets = ask(int(port_file.read_text().split()[0]), "/json/list")[1]
        url = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
        with connect(url, max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(20)


def test_the_page_needs_nothing_from_elsewhere():
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)([^"'\s>)]+)""", page) == []
    assert "://" not in page


def test_a_visitor_continues_a_text(browser, tokenizer):
    """The text that streams into the page is the one that the server gives for the same settings."""
    with serving(tokenizer) as port:
        browser.open(port)
        browser.until("document.getElementById('model').textContent === 'tiny'")
        assert browser.js("document.activeElement.id") == "prompt"
        browser.js("['seed', 'max_tokens'].forEach((id, i) => at(id).value = [7, 90][i]); at('prompt').value = 'ka lo'")
        browser.press("Enter", ctrl=True)
        browser.until("/tok\\/s/.test(at('status').textContent)")
        body = {"model": "tiny", "prompt": "ka lo", "max_tokens": 90, "temperature": 0.8, "top_k": 50, "seed": 7}
        expected = ask(port, body=body)[1]
        assert browser.js("at('answer').textContent") == expected["choices"][0]["text"]
        assert browser.js("at('status').textContent").startswith(f"{expected['usage']['completion_tokens']} tokens in")
        browser.screenshot("light")
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        browser.call("Emulation.setEmulatedMedia", features=dark)
        browser.screenshot("dark")
        browser.call("Emulation.setEmulatedMedia", features=[])
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)
        assert browser.js("document.documentElement.scrollWidth") <= 360  # nothing sticks out on a phone
        browser.screenshot("phone")
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.js("at('adopt').click()")
        kept = ("ka lo" + expected["choices"][0]["text"]).replace("\r", "\n")  # as a text area has it
        assert browser.js("at('prompt').value") == kept
    assert browser.problems == []


def test_the_page_says_what_is_wrong_and_asks_for_a_key(browser, tokenizer):
    with serving(tokenizer, Access(key_sha256=KEY_SHA256)) as port:
        browser.open(port)
        browser.until("/wants an API key/.test(at('status').textContent)")
        assert not browser.js("at('key-row').hidden")
        browser.js("at('key').value = 'wrong'; at('go').click()")
        browser.until("/not the API key/.test(at('status').textContent)")
        browser.screenshot("key")
        browser.js("at('key').value = 'key'; at('max_tokens').value = 3; at('go').click()")
        browser.until("/tok\\/s/.test(at('status').textContent)")
        browser.js("at('prompt').value = 'x'.repeat(900); at('go').click()")
        browser.until("/context is 256 tokens/.test(at('status').textContent)")
    browser.js("at('go').click()")
    browser.until("/cannot be reached/.test(at('status').textContent)")

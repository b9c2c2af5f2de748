"""A headless Chromium, driven over its DevTools pipe, that checks a page's layout, requests and console messages."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--mute-audio")
OPTIONS += ("--disable-background-networking", "--disable-dev-shm-usage", "--disable-extensions")
COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
PATIENCE = 120.0
WINDOWS: dict[str, dict[str, Any]] = {
    "light": {"width": 1280},
    "dark": {"width": 1280, "dark": True},
    "phone": {"width": 390, "height": 844, "mobile": True},
    "dark phone": {"width": 390, "height": 844, "mobile": True, "dark": True},
}
"""The windows in which pages are checked, as arguments of `Browser.open`."""
BESIDE = """(within, scrolling) => [...document.querySelectorAll(`${within} *`)].filter(element =>
  !element.closest(scrolling) && element.getBoundingClientRect().right > innerWidth + 1)
  .map(element => element.outerHTML.slice(0, 80))"""
OVER = """(() => {
  const found = [];
  const meets = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const check = (elements, where) => {
    const boxes = elements.map(element => [element, element.getBoundingClientRect()]);
    for (const [i, [one, a]] of boxes.entries()) for (const [other, b] of boxes.slice(i + 1))
      if (meets(a, b)) found.push(`${where}: ${one.textContent.slice(0, 40)} / ${other.textContent.slice(0, 40)}`);
  };
  check([...document.querySelectorAll('header, section, footer')], 'sections');
  check([...document.querySelectorAll('figure, details')], 'figures');
  for (const plot of document.querySelectorAll('svg.plot')) {
    const frame = plot.getBoundingClientRect();
    const words = [...plot.querySelectorAll('text')];
    check(words, plot.getAttribute('aria-label'));
    for (const word of words) {
      const box = word.getBoundingClientRect();
      const across = box.left >= frame.left - 1 && box.right <= frame.right + 1;
      if (!across || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        found.push(`outside of ${plot.getAttribute('aria-label')}: ${word.textContent}`);
    }
  }
  return found;
})()"""
SMALLEST = """Math.min(...[...document.querySelectorAll('svg.plot text')].map(word =>
  parseFloat(getComputedStyle(word).fontSize) * word.ownerSVGElement.getScreenCTM().a))"""
COLOURS = "[getComputedStyle(document.body).color, getComputedStyle(document.querySelector('svg.plot text')).fill]"
INKS = {False: "rgb(27, 31, 36)", True: "rgb(230, 230, 230)"}


class Browser:
    """A browser with one page, as a context manager; raises `TimeoutError` if the browser does not answer."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(  # the browser reads from descriptor 3 and writes to 4
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._events = b"", 0, []  # type: tuple[bytes, int, list[dict[str, Any]]]
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *stopped: object) -> None:
        os.close(self._out)  # the browser exits when its pipe is closed
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a DevTools command and return its result; raises `RuntimeError` with the browser's error message."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._in, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False, mobile: bool = False) -> None:
        """Load a file in a window of this size (CSS pixels) and forget the messages and requests recorded before."""
        self._events.clear()
        self._width = width
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        failed = self.call("Page.navigate", url=page.resolve().as_uri()).get("errorText")
        if failed:
            raise RuntimeError(f"{page}: {failed}")
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """Evaluate a JavaScript expression in the page and return its value."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Errors, warnings and console messages of the page."""
        return [event["params"] for event in self._events if event.get("method") in COMPLAINTS]

    @property
    def requests(self) -> list[str]:
        """URLs that the page requested, other than data: URIs."""
        sent = [event["params"] for event in self._events if event.get("method") == "Network.requestWillBeSent"]
        urls = [each["request"]["url"] for each in sent]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def too_wide(self) -> int:
        """Pixels by which the page is wider than the requested window: a phone widens its window for such a page."""
        return int(self.evaluate("Math.max(document.documentElement.scrollWidth, innerWidth)")) - self._width

    def beside(self, within: str = "body", scrolling: str = ".scroll, pre, svg") -> list[str]:
        """Return elements in ``within`` that extend beyond the window, except in ``scrolling`` (CSS selectors)."""
        return list(self.evaluate(f"({BESIDE})({json.dumps(within)}, {json.dumps(scrolling)})"))

    def over(self) -> list[str]:
        """Return sections, figures and plot texts that overlap each other, and texts that their plot cuts off."""
        return list(self.evaluate(OVER))

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


def check_page(browser: Browser, page: Path, window: str, picture: Path) -> None:
    """Assert that a page with plots opens without messages or requests, fits the window and is legible."""
    browser.open(page, **WINDOWS[window])
    assert browser.complaints == []
    assert browser.requests == [page.as_uri()]
    assert browser.too_wide <= 0
    assert browser.beside() == []
    assert browser.over() == []
    assert browser.evaluate(SMALLEST) >= 9
    assert browser.evaluate(COLOURS) == [INKS[WINDOWS[window].get("dark", False)]] * 2
    browser.screenshot(picture)
    assert picture.stat().st_size > 20_000

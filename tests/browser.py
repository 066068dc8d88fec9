"""A real browser, Chromium as Qt WebEngine, which pip installs whole: shows one file and says what is there.

It is a process of its own: ``look`` starts it, and what Chromium or Qt do when they end stays outside of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

SECONDS, HEIGHT, MARK = 60, 800, 4
NONE = 3
"""Exit code of a process that found no browser."""


class NoBrowser(Exception):
    """Qt WebEngine is not installed, or a library of the system that it needs."""


@dataclass(frozen=True)
class View:
    """A page at one width of the window, after a walk through it by Tab, with Return on details that are closed.
    ``focused``: what that expression gave at each stop, until the focus left the page; ``found``: what the other gave
    in the end; ``pixels`` uint8 [height, width, 3]: the whole page, ``picture`` the same as PNG.
    """

    width: int
    found: Any
    focused: tuple[Any, ...]
    pixels: np.ndarray
    picture: Path


@dataclass(frozen=True)
class Visit:
    """What the page asked for (addresses), what it said to the console, and its views."""

    requests: tuple[str, ...]
    console: tuple[str, ...]
    views: tuple[View, ...]


def look(page: Path, scheme: str, widths: Sequence[int], found: str, focused: str, folder: Path) -> Visit:
    """Open ``page`` in the colour ``scheme`` (light or dark). ``found`` and ``focused`` are expressions of JavaScript
    whose values JSON can hold. Raises ``NoBrowser``, or ``RuntimeError`` with what the browser said at its end.
    """
    job = {"page": str(page), "widths": list(widths), "found": found, "focused": focused, "folder": str(folder)}
    preferred = {"dark": 0, "light": 1}[scheme]
    environment = {
        **os.environ,
        "QT_QPA_PLATFORM": "offscreen",
        "QT_ENABLE_HIGHDPI_SCALING": "0",
        "QTWEBENGINE_DISABLE_SANDBOX": "1",  # root, as whom CI runs, has none
        "QTWEBENGINE_CHROMIUM_FLAGS": f"--blink-settings=preferredColorScheme={preferred}",
    }
    ran = subprocess.run(
        [sys.executable, __file__, json.dumps(job)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS * 2,
    )
    if ran.returncode == NONE:
        raise NoBrowser(ran.stderr.strip().splitlines()[-1])
    if ran.returncode:
        raise RuntimeError(f"the browser ended with {ran.returncode}: {ran.stderr[-2000:]}")
    told = json.loads(ran.stdout.splitlines()[-1])
    views = []
    for view in told["views"]:
        raw = np.fromfile(view["raw"], np.uint8).reshape(view["height"], view["stride"])
        pixels = raw[:, : view["width"] * 4].reshape(view["height"], view["width"], 4)[..., :3]
        views.append(View(view["width"], view["found"], tuple(view["focused"]), pixels, Path(view["picture"])))
    return Visit(tuple(told["requests"]), tuple(told["console"]), tuple(views))


def _browse(job: dict[str, Any]) -> dict[str, Any]:
    from PySide6.QtCore import QEventLoop, Qt, QTimer, QUrl
    from PySide6.QtGui import QColor, QImage, QPainter
    from PySide6.QtTest import QTest
    from PySide6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineProfile,
        QWebEngineSettings,
        QWebEngineUrlRequestInterceptor,
    )
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    application = QApplication([sys.argv[0]])
    told: dict[str, Any] = {"requests": [], "console": [], "views": []}

    class Requests(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info: Any) -> None:  # noqa: N802
            told["requests"].append(info.requestUrl().toString())

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:  # noqa: N802
            told["console"].append(f"{source}:{line}: {message}")

    requests, profile = Requests(), QWebEngineProfile()
    profile.setUrlRequestInterceptor(requests)
    page, view = Page(profile), QWebEngineView()
    view.setPage(page)

    def wait(start: Any) -> Any:
        """Until what ``start`` begins calls back."""
        loop, results = QEventLoop(), []
        QTimer.singleShot(SECONDS * 1000, loop.quit)
        start(lambda value: (results.append(value), loop.quit()))
        if not results:
            loop.exec()
        if not results:
            raise TimeoutError("the browser does not answer")
        return results[0]

    def run(expression: str) -> Any:
        return wait(lambda back: page.runJavaScript(f"JSON.stringify({expression})", back))

    def until(condition: str) -> None:
        for _ in range(SECONDS * 100):
            if run(f"!!({condition})") == "true":
                return
            QTest.qWait(10)
        raise TimeoutError(f"the browser does not come to {condition}")

    def painted(number: int) -> QImage:
        """What is drawn now: the frame that has a mark of this number's colour in its corner, once nothing changes."""
        colour = QColor(number % 256, 77, 177 + number // 256)
        run(f"(document.getElementById('mark').style.background = '{colour.name()}')")
        last = None
        for _ in range(SECONDS * 20):
            QTest.qWait(50)
            image = view.grab().toImage().convertToFormat(QImage.Format.Format_RGBA8888)
            if image == last and image.pixelColor(1, 1) == colour:
                for x, y in product(range(MARK), repeat=2):
                    image.setPixelColor(x, y, image.pixelColor(MARK, y))
                return image
            last = image
        raise TimeoutError("the page does not come to rest")

    def picture_of_all(width: int) -> QImage:
        """Screen after screen, one below the other."""
        place = f"position: fixed; left: 0; top: 0; width: {MARK}px; height: {MARK}px; z-index: 9"
        run(f"(document.body.insertAdjacentHTML('beforeend', '<i id=mark style=\"{place}\"></i>'), 0)")
        height = int(run("document.documentElement.scrollHeight"))
        whole, top = QImage(width, height, QImage.Format.Format_RGBA8888), 0
        painter = QPainter(whole)
        while top < height:
            run(f"scrollTo(0, {top})")
            drawn = painted(top // view.height() + 1)
            painter.drawImage(0, int(float(run("scrollY"))), drawn)
            top += view.height()
        painter.end()
        run("document.getElementById('mark').remove()")
        return whole

    page.settings().setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)
    view.show()
    view.resize(job["widths"][0], HEIGHT)
    loaded = wait(lambda back: (view.loadFinished.connect(back), view.load(QUrl.fromLocalFile(job["page"]))))
    if not loaded:
        raise OSError(f"{job['page']} does not load")
    for width in job["widths"]:
        view.resize(width, HEIGHT)
        until(f"innerWidth === {width}")
        focused: list[Any] = []
        view.setFocus()
        run("document.activeElement.blur()")
        run("(window.moves = 0, ['focusin', 'focusout'].forEach(e => addEventListener(e, () => moves++)))")
        while len(focused) < 500:
            before = run("moves")
            QTest.keyClick(view.focusProxy(), Qt.Key.Key_Tab)
            until(f"moves != {before}")
            if run("document.activeElement.matches('details:not([open]) > summary')") == "true":
                QTest.keyClick(view.focusProxy(), Qt.Key.Key_Return)
                until("document.activeElement.parentElement.open")
            where = json.loads(run(job["focused"]))
            if where is None:
                break
            focused.append(where)
        run("document.activeElement.blur()")
        image = picture_of_all(width)
        found = json.loads(run(job["found"]))
        picture, raw = f"{job['folder']}/{width}.png", f"{job['folder']}/{width}.rgba"
        image.save(picture)
        with open(raw, "wb") as file:  # noqa: PTH123
            file.write(bytes(image.constBits()))
        told["views"].append({
            "width": image.width(), "height": image.height(), "stride": image.bytesPerLine(), "found": found,
            "focused": focused, "picture": picture, "raw": raw,
        })  # fmt: skip
    page.deleteLater()
    application.processEvents()
    return told


if __name__ == "__main__":
    try:
        import PySide6.QtWebEngineWidgets  # noqa: F401
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(NONE)
    print(json.dumps(_browse(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # What the engine says as it is taken down concerns nobody.

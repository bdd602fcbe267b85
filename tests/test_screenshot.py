"""The pages in a real browser: desktop and phone width, light and dark. Skipped where there is no Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import finished

from planner.run_report import write_report

image = pytest.importorskip("matplotlib.image", reason="needs the extra 'report'")

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no Chromium: apt install chromium")]

DESKTOP, PHONE = 1280, 390
MARGIN = 8  # pixels at the right edge in which nothing may stand: what does is cut off


def shot(page: Path, width: int, *, dark: bool, folder: Path) -> Any:
    """The page as pixels, (height, width, 3) in a frame: a browser's own window is no narrower than 500."""
    frame = folder / "frame.html"
    inside = f'<iframe src="{page.as_uri()}" width="{width}" height="1500" style="border:0"></iframe>'
    frame.write_text(f'<body style="margin:0">{inside}', encoding="utf-8")
    picture = folder / "shot.png"
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={folder}/user",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={picture}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files",
            f"--window-size={max(width, 520)},1500", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert picture.is_file(), done.stderr
    return image.imread(picture)[:, :width, :3]


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_of_a_run_is_whole_in_a_browser(width: int, dark: bool, tmp_path: Path) -> None:
    pixels = shot(write_report(finished(tmp_path / "run")), width, dark=dark, folder=tmp_path)
    background = pixels[2, 2]
    assert (background.mean() < 0.2) if dark else (background.mean() > 0.9)
    assert np.allclose(pixels[:, -MARGIN:], background, atol=0.02), "nothing is cut off at the right"
    written = np.abs(pixels - background).max(axis=2) > 0.3
    assert written.any(axis=1).mean() > 0.3, "lines of text and charts from top to bottom"
    strong = pixels.max(axis=2) - pixels.min(axis=2) > 0.5
    blue = strong & (pixels.argmax(axis=2) == 2)
    assert blue[:, : width // 2].any(), "the curves"
    assert blue[:, width // 2 :].any(), "to their end"

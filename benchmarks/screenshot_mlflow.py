"""Takes the README's picture of the MLflow view of a recorded run, with a headless Chromium.

    python benchmarks/screenshot_mlflow.py sqlite:///runs/mlflow.db docs/images/mlflow_results.png --experiment quickstart

Needs `chromium` and `chromedriver` (Debian: chromium-driver).
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from autokernel.tracking.ui import find_experiment, open_ui
from autokernel.tracking.views import CHART, HOTSPOTS, RESULTS, TRIALS

_VIEWS = {"results": RESULTS, "hotspots": HOTSPOTS, "trials": TRIALS, "chart": CHART}
# MLflow opens an assistant panel by itself and explains that a shared view is shared.
_TIDY = """
for (const id of ["mlflow.assistant.chat_panel.close", "mlflow.assistant.chat_panel.setup_close"])
  document.querySelector(`[data-component-id="${id}"]`)?.click();
for (const e of document.querySelectorAll('[role="alert"]'))
  if (e.textContent.includes("shared view")) [...e.querySelectorAll("button")].pop()?.click();
"""


class Browser:
    """A headless Chromium behind chromedriver, spoken to in plain WebDriver."""

    def __init__(self, driver: str, size: str, profile: str) -> None:
        self._process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        ports = (re.search(r"successfully on port (\d+)", line) for line in self._process.stdout)
        self._base = f"http://127.0.0.1:{next(match.group(1) for match in ports if match)}"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += [f"--user-data-dir={profile}", f"--window-size={size}"]
        capabilities = {"browserName": "chrome", "goog:chromeOptions": {"args": flags}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._base += f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._base + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def screenshot(self, url: str, out: Path, wait_s: float) -> None:
        """One page as PNG, without what MLflow lays over it, after `wait_s` seconds to draw."""
        self._call("POST", "/url", {"url": url})
        time.sleep(wait_s / 2)
        self._call("POST", "/execute/sync", {"script": _TIDY, "args": []})
        time.sleep(wait_s / 2)
        out.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        """End the browser, then its driver."""
        self._call("DELETE", "")
        self._process.terminate()
        self._process.wait(10)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tracking_uri", help="e.g. sqlite:///runs/mlflow.db, or a server's address")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--experiment", required=True, help="name of the autokernel experiment")
    parser.add_argument("--view", choices=_VIEWS, default="hotspots")
    parser.add_argument("--size", default="1600,900")
    parser.add_argument("--wait", type=float, default=20, help="seconds the page may draw")
    parser.add_argument("--driver", default="chromedriver", help="WebDriver of a Chromium that is installed")
    arguments = parser.parse_args()
    with open_ui(arguments.tracking_uri) as ui:
        experiment_id = find_experiment(arguments.tracking_uri, arguments.experiment)
        if experiment_id is None:
            print(f"no run of experiment {arguments.experiment!r} is recorded in {arguments.tracking_uri}", file=sys.stderr)
            return 2
        url = ui.url(experiment_id, _VIEWS[arguments.view])
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            browser = Browser(arguments.driver, arguments.size, profile)
            try:
                browser.screenshot(url, arguments.out.resolve(), arguments.wait)
            finally:
                browser.close()
    print(f"{arguments.out}: {url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A JupyterLab on loopback and a Chromium for the tests that use the notebooks as a student does.

Needs a Chromium or Chrome on the machine (`apt-get install chromium`, or its path in the variable
CHROMIUM); without one these tests are skipped with that sentence. Each pytest-xdist worker has its own
server, port and folders; `--dist loadgroup` keeps the tests on one worker and so starts one server.
"""

import base64
import contextlib
import io
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb",
]  # fmt: skip
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # all cells stand in the page, also those outside the window
    "notebook-extension/tracker": {"windowingMode": "none"},
}
SETTLED = """words => document.querySelector('.explorer-line .widget-html-content').textContent === words"""
DESCRIBED = """([attribute, words]) => document.querySelector('img.explorer-picture')[attribute] === words"""
PNG_OF_PAGE = """async () => {
    const picture = await (await fetch(document.querySelector('img.explorer-picture').src)).blob();
    const reader = new FileReader();
    return await new Promise(done => {
        reader.onload = () => done(reader.result.split(',')[1]); reader.readAsDataURL(picture) }) }"""


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def browser() -> Iterator:
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for found in map(shutil.which, filter(None, names)) if found), None)
    if path is None:
        pytest.skip("no Chromium on this machine: install chromium, or give its path in the variable CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Server:
    """A running JupyterLab: its address, token and the folder it shows."""

    def __init__(self, url: str, token: str, root: Path) -> None:
        self.url, self.token, self.root = url, token, root

    def write(self, name: str, cells: list[str]) -> None:
        """Write a notebook of code cells into the folder."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.root / name)


@pytest.fixture(scope="session")
def server(browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """JupyterLab with throw-away settings, runtime files and progress; `browser` first, for it may skip."""
    home = tmp_path_factory.mktemp("jupyterlab")
    root = home / "root"
    root.mkdir()
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    folders = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "EFFNLP_HOME": "progress",
    }  # fmt: skip
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    environment |= {"EFFNLP_GUESSES": "recorded"}
    token = secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
        "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with open(home / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Server(wait_for_server(process, home, token), token, root)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for_server(process: subprocess.Popen, home: Path, token: str) -> str:
    """The address under which the server answers (it takes another port when the asked one is gone)."""
    for _ in range(240):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, StopIteration, ValueError):
            facts = json.loads(next((home / "runtime").glob("jpserver-*.json")).read_text())
            url = f"http://127.0.0.1:{facts['port']}"
            urllib.request.urlopen(f"{url}/api/status?token={token}", timeout=1).read()
            return url
        time.sleep(0.25)
    pytest.fail("JupyterLab did not start:\n" + (home / "server.log").read_text()[-3_000:])


class Lab:
    """A page of JupyterLab and the few moves that the tests make in it."""

    def __init__(self, page, server: Server) -> None:
        self.page, self.server = page, server
        self.requests_outside: list[str] = []
        self.console_errors: list[str] = []
        page.on("request", self._note_request)
        page.on("console", lambda m: self.console_errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.console_errors.append(str(error)))

    def _note_request(self, request) -> None:
        inside = (self.server.url, self.server.url.replace("http", "ws"), "data:", f"blob:{self.server.url}")
        if not request.url.startswith(inside):
            self.requests_outside.append(request.url)

    def open(self, name: str) -> None:
        """Open a notebook; return when its kernel is idle."""
        workspace = f"{self.server.url}/lab/workspaces/test-{secrets.token_hex(4)}"
        self.page.goto(f"{workspace}/tree/{name}?reset&token={self.server.token}")
        self.page.wait_for_function("window.jupyterapp !== undefined", timeout=60_000)
        self.page.evaluate("() => jupyterapp.restored")
        self.page.locator(".jp-Notebook").first.wait_for(timeout=60_000)
        self.page.wait_for_function(
            """() => { const session = jupyterapp.shell.currentWidget?.sessionContext;
                return session?.isReady && session.kernelDisplayStatus === 'idle' }""",
            timeout=60_000,
        )

    def run_all(self) -> None:
        """Run every cell; fail on the first error output."""
        self.page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")  # when all is done
        assert self.errors() == []
        cells = self.page.evaluate(
            """() => jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code'
                && cell.model.sharedModel.getSource().trim()).map(cell => cell.model.executionCount)"""
        )
        assert cells and None not in cells, f"cells that did not run: {cells}"

    def outputs(self) -> list[dict]:
        return self.page.evaluate(
            """() => jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code')
                .flatMap(cell => cell.model.outputs.toJSON())"""
        )

    def errors(self) -> list[str]:
        return [f"{o['ename']}: {o['evalue']}" for o in self.outputs() if o["output_type"] == "error"]

    def settled(self, explorer) -> None:
        """Wait until the line below the picture says what that explorer, in this process, says."""
        self.page.wait_for_function(SETTLED, arg=explorer.summary(explorer.state), timeout=10_000)

    def assert_shows(self, explorer, description: str = "alt") -> np.ndarray:
        """Line, description and pixels, in the file and on the screen, are that explorer's.

        Words and picture come in messages of their own, so each is waited for. `description` is the attribute that
        holds the alt text. Returns the pixels of the screen.
        """
        self.settled(explorer)
        self.page.wait_for_function(DESCRIBED, arg=[description, explorer.alt], timeout=10_000)
        of_class, until = pixels(bytes(explorer.image.value)), time.monotonic() + 5
        while not (same := np.array_equal(pixels(base64.b64decode(self.page.evaluate(PNG_OF_PAGE))), of_class)):
            if time.monotonic() > until:
                break
            self.page.wait_for_timeout(100)
        assert same, "the picture is not that of the class"
        # the frame that shows the focus of a painted picture is not ours
        self.page.evaluate("() => { if (document.querySelector('.painted-pad')) document.activeElement.blur() }")
        self.page.mouse.move(5, 5)
        self.page.wait_for_function("() => document.querySelector('img.explorer-picture').complete")
        on_screen = pixels(self.page.locator("img.explorer-picture").screenshot())
        assert on_screen.shape == of_class.shape, "the picture is not shown at its own size"
        assert np.abs(on_screen.astype(int) - of_class).max() <= 2
        return on_screen

    def close(self) -> None:
        self.page.evaluate("() => jupyterapp.serviceManager.sessions.shutdownAll()")  # the next has a new kernel
        self.page.context.close()


@pytest.fixture(scope="module")
def lab(browser, server: Server) -> Iterator[Lab]:
    """One page for the tests of a module: opening it takes longer than they do."""
    context = browser.new_context(viewport={"width": 1_400, "height": 900})
    context.set_default_timeout(20_000)
    lab = Lab(context.new_page(), server)
    yield lab
    lab.close()


@pytest.fixture
def quiet(lab: Lab) -> Iterator[None]:
    """Fail when the page asked for anything outside the server or wrote an error to the console."""
    lab.requests_outside.clear()
    lab.console_errors.clear()
    yield
    assert lab.requests_outside == []
    assert lab.console_errors == []

"""Every notebook, opened and run in JupyterLab as a student does."""

import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(file.name for file in FOLDER.glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_and_shows_every_widget(lab, quiet, tmp_path, name):
    shutil.copy(FOLDER / name, lab.server.root)  # a copy: JupyterLab saves what it opens
    lab.open(name)
    lab.run_all()
    page = lab.page
    widgets = sum(WIDGET in output.get("data", {}) for output in lab.outputs())
    page.wait_for_function(
        """expected => {
            const widgets = [...document.querySelectorAll('.jp-OutputArea-output .jupyter-widgets')];
            const outermost = widgets.filter(node => !node.parentElement.closest('.jupyter-widgets'));
            return outermost.length === expected && outermost.every(node => node.offsetHeight > 0) }""",
        arg=widgets,
    )
    pictures = page.evaluate(
        """() => [...document.querySelectorAll('.jp-OutputArea-output img')]
            .map(picture => [picture.complete, picture.naturalWidth, picture.offsetWidth])"""
    )
    assert all(complete and natural > 0 and shown > 0 for complete, natural, shown in pictures), pictures
    # the whole page in one picture, for whoever wants to look
    outside = page.evaluate(
        """() => { const pane = document.querySelector('.jp-Notebook .jp-WindowedPanel-outer');
            pane.scrollTop = 0; return pane.scrollHeight - pane.clientHeight }"""
    )
    page.set_viewport_size({"width": 1_400, "height": min(900 + int(outside), 16_000)})
    page.wait_for_timeout(500)
    file = tmp_path / f"{Path(name).stem}.png"
    page.screenshot(path=file)
    page.set_viewport_size({"width": 1_400, "height": 900})
    print(f"{name}: {widgets} widgets, {len(pictures)} pictures, screenshot in {file}")

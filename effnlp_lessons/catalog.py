"""The table of contents that is tested: reads `catalog.toml`, and makes from it what README shows.

`python -m effnlp_lessons.catalog` puts the coverage table into README.md between its two markers, and draws
README's picture.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from effnlp_lessons.paths import ROOT

FILE = Path(__file__).with_name("catalog.toml")
PICTURE = ROOT / "notebooks" / "images" / "cost_explorer.png"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"


@dataclass(frozen=True)
class Row:
    """One technique. Every field must be given but for `kind = "ground"`: exercise, widget, study may lack there."""

    name: str
    kind: str
    paper: str
    symbols: list[str]
    section: str
    tests: list[str]
    exercise: list[str] | None = None
    widget: str | None = None
    study: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("technique", "ground"):
            raise ValueError(f'{self.name}: kind must be "technique" or "ground", got {self.kind!r}')
        lacking = [name for name in ("exercise", "widget", "study") if not getattr(self, name)]
        if self.kind == "technique" and lacking:
            raise ValueError(f"{self.name}: a technique needs {', '.join(lacking)} too")


def load_catalog(file: Path = FILE) -> list[Row]:
    """Every row of the catalogue.

    Raises:
        ValueError: a technique that lacks a field, or has one that is not known.
    """
    rows = []
    for row in tomllib.loads(file.read_text(encoding="utf-8"))["row"]:
        try:
            rows.append(Row(**row))
        except TypeError as error:
            raise ValueError(f"{row.get('name')}: {error}") from None
    return rows


def coverage_table() -> str:
    """README's coverage table, Markdown."""
    lines = ["| technique | paper | notebook | exercises | tests | widget | study |", "|---|---|---|---|---|---|---|"]
    for row in load_catalog():
        notebook = row.section.split("#")[0]
        widget = row.widget.split(":")[1] if row.widget else ""
        cells = (
            row.name, row.paper, f"[{notebook}](notebooks/{notebook}.ipynb)", str(len(row.exercise or []) or ""),
            str(len(row.tests)), widget, row.study or "",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_coverage(readme: str) -> str:
    """`readme` with the present coverage table between its markers.

    Raises:
        ValueError: README.md without the two markers.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{coverage_table()}\n{END}{rest.split(END)[1]}"


def picture() -> bytes:
    """README's picture, PNG: the cost explorer of notebook 00 as it opens."""
    from effnlp_lessons.widgets.cost_explorer import CostExplorer

    return CostExplorer(length=512, model="BERT-base").image.value


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_coverage(readme.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(picture())
    print("README.md: coverage table and picture written")

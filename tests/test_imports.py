"""What importing costs: the ground floor loads none of the heavy packages, and no part is slow to import."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import effnlp_lessons
from effnlp_lessons.paths import ROOT

HEAVY = ["transformers", "triton", "matplotlib", "ipywidgets"]
WINGS = ["distillation", "quantization", "pruning", "attention", "architectures"]
TRITON_FILES = [f"effnlp_lessons/attention/{name}.py" for name in ("flash_kernels", "triton_tools", "triton_offline")]

# Imports the modules named on the command line after torch; prints for each what it loaded and its seconds
# of processor time, which a busy machine does not stretch.
PROBE = """
import importlib, json, sys, time
import torch
costs = {}
for name in sys.argv[1:]:
    before, started = set(sys.modules), time.process_time()
    importlib.import_module(name)
    seconds = time.process_time() - started
    costs[name] = [seconds, sorted({module.split(".")[0] for module in set(sys.modules) - before})]
print(json.dumps(costs))
"""


def ground_floor() -> list[str]:
    """The modules of the lowest layer of import-linter's contract, as far as they exist."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = [name.strip(" ()") for name in contracts[0]["layers"][-1].split(":")]
    return [module for name in names for module in modules(name)]


def modules(name: str) -> list[str]:
    """The dotted names of a module, or of a package with all that is in it; empty when there is none."""
    package = ROOT / "effnlp_lessons"
    files = [package / f"{name}.py", *sorted((package / name).rglob("*.py"))]
    dotted = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.exists()]
    return [module.removesuffix(".__init__") for module in dotted if not module.endswith("__main__")]


def probe(names: list[str]) -> dict[str, tuple[float, list[str]]]:
    command = [sys.executable, "-c", PROBE, *names]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_the_package_imports_nothing():
    tree = ast.parse(Path(effnlp_lessons.__file__).read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_the_ground_floor_is_light_and_quick():
    names = ["effnlp_lessons", *ground_floor()]
    assert "effnlp_lessons.environment" in names
    costs = probe(names)
    heavy = {name: sorted(set(HEAVY) & set(loaded)) for name, (_, loaded) in costs.items()}
    assert {name: found for name, found in heavy.items() if found} == {}
    assert sum(seconds for seconds, _ in costs.values()) < 0.5, costs


def test_every_folder_of_modules_is_a_package():
    folders = {file.parent for file in (ROOT / "effnlp_lessons").rglob("*.py")}
    lacking = sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists())
    assert not lacking, f"without __init__.py import-linter does not see them: add it in {lacking}"


def test_every_wing_that_exists_is_light_and_quick():
    for wing in WINGS:
        names = [name for name in modules(wing) if name.replace(".", "/") + ".py" not in TRITON_FILES]
        costs = probe(names)
        heavy = {name: sorted(set(HEAVY) & set(loaded)) for name, (_, loaded) in costs.items()}
        assert {name: found for name, found in heavy.items() if found} == {}
        assert sum(seconds for seconds, _ in costs.values()) < 0.5, costs


def imported_at_the_top(file: Path) -> set[str]:
    """The packages that importing `file` imports directly: all import statements outside of functions."""
    found, statements = set(), list(ast.parse(file.read_text(encoding="utf-8")).body)
    while statements:
        statement = statements.pop()
        if isinstance(statement, ast.Import):
            found |= {name.name.split(".")[0] for name in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            found.add((statement.module or "").split(".")[0])
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            statements += ast.iter_child_nodes(statement)
    return found


def test_only_the_triton_files_import_triton():
    files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "effnlp_lessons").rglob("*.py"))]
    importing = [name for name in files if "triton" in imported_at_the_top(ROOT / name)]
    assert set(importing) <= set(TRITON_FILES)


def test_the_search_for_imports_finds_them(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("if True:\n    try:\n        import triton.language\n    except ImportError:\n        pass\n")
    assert imported_at_the_top(file) == {"triton"}
    file.write_text("class Kernel:\n    def run(self):\n        import triton\n")
    assert imported_at_the_top(file) == set()

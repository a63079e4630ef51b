"""Makes notebooks/build.py, which is a script and in no package, importable as `notebooks_build`."""

import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).resolve().parents[2] / "notebooks" / "build.py"
_spec = importlib.util.spec_from_file_location("notebooks_build", _file)
sys.modules["notebooks_build"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["notebooks_build"])

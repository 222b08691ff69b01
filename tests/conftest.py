"""Loads the notebook's own `define` cells as a library: no test holds a copy of its code."""
import json
import os
import pathlib
import types

os.environ.setdefault("MPLBACKEND", "agg")

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "gpt_from_scratch.ipynb"


def define_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if "define" in c["metadata"].get("tags", [])]


def load_library(replace=()):
    """The define cells, run in order in an empty namespace; each (old, new) of `replace` must occur exactly once."""
    sources = define_cells()
    for old, new in replace:
        assert sum(source.count(old) for source in sources) == 1, f"{old!r} must stand exactly once in the define cells"
        sources = [source.replace(old, new) for source in sources]
    module = types.ModuleType("notebook_library")
    for source in sources:
        exec(compile(source, "define cell", "exec"), module.__dict__)
    return module


@pytest.fixture(scope="session")
def library():
    return load_library()


def pytest_configure(config):
    config.addinivalue_line("markers", "faults: kills, full disks, damaged files, interrupts, bad input")
    config.addinivalue_line("markers", "slow: minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))

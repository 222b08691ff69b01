"""Loads the notebook's own `define` cells as a library: no test holds a copy of its code."""
import json
import linecache
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types

os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # two tests run at a time: their threads must not wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# before a test file is read: no time limit for an example, the same examples every time
hypothesis.settings.load_profile("ci")
ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "gpt_from_scratch.ipynb"


def committed(name):
    """The file as git has it, so that a reader's own edits don't fail a test; from the disk where
    there is no git."""
    found = shutil.which("git") and subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT,
                                                   capture_output=True)
    return found.stdout.decode() if found and found.returncode == 0 else (ROOT / name).read_text(
        encoding="utf-8")


def cells_with_tag(tag):
    """The sources of the notebook's cells with this tag."""
    return ["".join(cell["source"]) for _, cell in code_cells()
            if tag in cell["metadata"].get("tags", [])]


def code_cells():
    """[(section number, cell without its outputs), …] of the code cells."""
    section, cells = 0, []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown" and (
            found := re.match(r"## (\d+) ", "".join(cell["source"]))):
            section = int(found.group(1))
        elif cell["cell_type"] == "code":
            cells.append((section, {**cell, "outputs": []}))
    return cells


def cells_of_sections(first, last, without=("check", "exercise")):
    """[(source, tags), …] of the code cells of these sections, without those that have one of
    these tags."""
    cells = [("".join(cell["source"]), cell["metadata"].get("tags", []))
             for section, cell in code_cells() if first <= section <= last]
    return [(source, tags) for source, tags in cells if not set(without) & set(tags)]


def run_cells(first, last, settings="", replace=(), without=("exercise",), skip=None, space=None):
    """Runs the code cells of these sections, with a settings cell of one's own, each (old, new) of
    `replace` wherever it stands, and without cells that hold the text `skip`. → the namespace."""
    space = {"__name__": "run"} if space is None else space
    for source, tags in cells_of_sections(first, last, without):
        if skip is None or skip not in source:
            source = settings if "parameters" in tags else source
            for old, new in replace:
                source = source.replace(old, new)
            exec(compile(source, "cell", "exec"), space)
    return space


def load_library(replace=()):
    """The define cells, run in order in an empty namespace; each (old, new) of `replace` must
    occur exactly once."""
    sources = cells_with_tag("define")
    for old, new in replace:
        assert sum(source.count(old) for source in sources) == 1, f"{old!r} must stand once"
        sources = [source.replace(old, new) for source in sources]
    module = types.ModuleType("notebook_library")
    for i, source in enumerate(sources):
        name = f"<define cell {i}>"
        # so that inspect finds it
        linecache.cache[name] = len(source), None, source.splitlines(True), name
        exec(compile(source, name, "exec"), module.__dict__)
    return module


def outputs_text(notebook):
    """All that a notebook (dict) printed or displayed as text. A stream comes in pieces that may
    end anywhere, so they are joined as they are."""
    shown = lambda output: "".join(output.get("text", [])) or "\n" + "".join(
        output.get("data", {}).get("text/plain", [])) + "\n"
    return "\n".join("".join(shown(output) for output in cell.get("outputs", []))
                     for cell in notebook["cells"])


def execute_notebook(folder, python=sys.executable, **environment):
    """What the notebook in a folder prints, executed with the smoke preset unless told otherwise,
    offline."""
    # (jupyter execute reads by the system's encoding)
    values = {**os.environ, "GPT_PRESET": "smoke", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1",
              **environment}
    # so that jupyter is this Python's
    values["PATH"] = os.path.dirname(python) + os.pathsep + values["PATH"]
    if "TIKTOKEN_CACHE_DIR" not in environment:
        values.pop("TIKTOKEN_CACHE_DIR", None)
    # a pipe would stay open as long as any grandchild holds it
    with tempfile.TemporaryFile() as printed:
        done = subprocess.run([python, "-m", "jupyter", "execute", NOTEBOOK.name, "--output",
                               "run.ipynb"], cwd=folder, env=values,
                              stdout=printed, stderr=subprocess.STDOUT, timeout=900)
        printed.seek(0)
        assert done.returncode == 0, printed.read().decode("utf-8", "replace")[-3000:]
    return outputs_text(json.loads((folder / "run.ipynb").read_text(encoding="utf-8")))


def run_with(folder, settings_cell, before=None, more=(), **environment):
    """What the notebook prints with these settings: whole, or up to the cell that begins with
    `before`, and cells of one's own after it."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    if before:
        cells = cells[:next(i for i, cell in enumerate(cells)
                            if "".join(cell["source"]).startswith(before))]
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = settings_cell
    cells += [{"cell_type": "code", "id": f"more{i}", "metadata": {}, "outputs": [],
               "execution_count": None, "source": source}
              for i, source in enumerate(more)]
    (folder / NOTEBOOK.name).write_text(json.dumps({**notebook, "cells": cells}), encoding="utf-8")
    return execute_notebook(folder, **environment)


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers whichever ran before it."""
    import torch
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def library():
    return load_library()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run with -m slow")
    config.addinivalue_line("markers", "long: runs much of the notebook; begun first")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))

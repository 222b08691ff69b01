"""The notebook as a file: it runs twice with the smoke preset, and what is committed is clean.
README's words are true."""
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest

from conftest import (NOTEBOOK, ROOT, code_cells, committed, execute_notebook, load_library,
                      outputs_text, run_cells, run_with)


@pytest.fixture(scope="module")
def notebook():
    return json.loads(committed("gpt_from_scratch.ipynb"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder in which the whole notebook was run with the smoke preset, and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    shutil.copy(NOTEBOOK, folder)
    return folder, execute_notebook(folder)


@pytest.mark.long
@pytest.mark.xdist_group("smoke")
def test_smoke(smoke):
    folder, text = smoke
    assert "picked up the checkpoint" not in text
    assert "The score to beat: " in text and "the same logits, to the bit" in text
    assert "all 17 solutions are right" in text and "the real GPT-2 is not used: " in text
    assert sorted(os.listdir(folder)) == ["checkpoints", "data", "gpt_from_scratch.ipynb",
                                          "run.ipynb"]


@pytest.mark.long
@pytest.mark.xdist_group("smoke")
def test_smoke_again_picks_up_the_checkpoint(smoke):
    folder, first = smoke
    text = execute_notebook(folder)
    score, again = (re.search(r"GPT ([\d.]+) nats", each).group(1) for each in (first, text))
    assert "picked up the checkpoint" in text and again == score


def test_committed_notebook_was_executed_in_order(notebook):
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]
    assert "preset: laptop, corpus: python" in outputs_text(notebook)


def test_committed_notebook_is_clean(notebook):
    text = committed("gpt_from_scratch.ipynb")
    assert len(text.encode()) < 3_000_000 and "widgets" not in notebook["metadata"]
    outputs = json.dumps([cell.get("outputs") for cell in notebook["cells"]])
    assert not re.search(r"/(home|root|work|Users|tmp)/|site-packages", outputs)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            assert len(lines) <= 66 and all(len(line) <= 100 for line in lines)
            assert not ("define" in cell["metadata"].get("tags", [])
                        and cell["outputs"]), "a define cell printed something"


def test_headings_are_in_order_and_links_work(notebook):
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"]
                     if cell["cell_type"] == "markdown")
    headings = re.findall(r"^(#+) (.*)$", text, re.M)
    assert [level for level, _ in headings].count("#") == 1 and headings[0][0] == "#"
    for (a, _), (b, _) in zip(headings, headings[1:]):
        assert len(b) <= len(a) + 1
    anchors = {title.replace(" ", "-") for _, title in headings}
    links = re.findall(r"\]\(#([^)\n]+)\)", text)
    assert len(links) >= 20 and set(links) <= anchors, set(links) - anchors


def test_every_section_from_1_says_what_goes_in_and_out(notebook):
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"]
                     if cell["cell_type"] == "markdown")
    for number in range(0, 16):
        section = re.search(rf"^## {number} .*?(?=^## |\Z)", text, re.M | re.S).group(0)
        assert re.search(r"\*\*In\*\* .* → \*\*Out\*\*", section), number


def test_slides_are_as_many_as_readme_says(notebook):
    count = sum(cell["metadata"]["slideshow"]["slide_type"] == "slide"
                for cell in notebook["cells"])
    assert 30 <= count <= 55 and f"({count} of them:" in committed("README.md")


def test_every_figure_has_its_message(notebook):
    cells, figures = notebook["cells"], 0
    for i, cell in enumerate(cells):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            figures += 1
            source = "".join(cell["source"])
            titled = re.search(
                r"title=|title\(|draw_(tokens|flow|attention)\(|plot_(losses|sweep)\(", source)
            followed = next((c for c in cells[i + 1:i + 3] if c["cell_type"] == "markdown"),
                            {"source": "#"})["source"]
            assert titled or not "".join(followed).startswith(("#", "*Exercise")), source[:200]
        for output in cell.get("outputs", []):
            words = "".join(output.get("data", {}).get("text/plain", []))
            assert "image/png" in output.get("data", {}) or not words.startswith(
                "<Figure"), "a figure is shown as a line of text"
    assert figures >= 20


def test_readme_figures_stand_in_the_outputs(notebook):
    """Each figure in README between backquotes that starts with a digit must be printed by the
    committed notebook."""
    outputs = outputs_text(notebook)
    figures = re.findall(r"`([-−+]?\d[\d.,]*[%×]?)`", committed("README.md"))
    assert len(figures) >= 8
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)",
                         outputs), f"README says {figure}, but no output does"


def test_readme_commands_and_sample(notebook):
    readme = committed("README.md")
    commands = [line for line in readme.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert "jupyter nbconvert --to notebook --execute gpt_from_scratch.ipynb" in commands[0]
    assert "pytest" in commands[1]
    sample = re.search(r"```python\n(.*?)```", readme, re.S).group(1).strip()
    assert sample in outputs_text(notebook), "the sample in README is not in the outputs"


def test_top_level_holds_what_was_agreed():
    listed = shutil.which("git") and subprocess.run(["git", "ls-tree", "--name-only", "HEAD"],
                                                    cwd=ROOT, capture_output=True, text=True)
    if not listed or listed.returncode:
        pytest.skip("needs a git checkout")
    assert {name for name in listed.stdout.split() if not name.startswith(".")} == {
        "gpt_from_scratch.ipynb", "data", "checkpoints", "requirements.txt", "README.md", "LICENSE",
        "tests"}
    files = subprocess.run(["git", "ls-tree", "-r", "--name-only", "HEAD", "tests", "data"],
                           cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert all(re.fullmatch(r"tests/(\w+\.(py|txt|ini)|BENCHMARKS\.md|LOG\.md)|data/README\.md",
                            name) for name in files), "what a run leaves behind is not committed"


def smoke_with(changes):
    return f'preset = "smoke"\nchanges = {changes!r}'


@pytest.mark.long
def test_gpt2s_choices_run_from_top_to_bottom_as_a_script(tmp_path):
    """By plain Python, without a notebook's display, in a folder with blanks and other letters,
    under another name."""
    folder = tmp_path / "mein Träger 東"
    folder.mkdir()
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = smoke_with({**load_library().CLASSIC, "dropout": 0.1,
                                         "split_pattern": "gpt2"})
    (folder / "my gpt.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "script", "my gpt.ipynb"],
                   cwd=folder, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "my gpt.py"], cwd=folder, capture_output=True,
                          encoding="utf-8", timeout=600, env={
        **os.environ, "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parameters, as on paper" in done.stdout and "could not run" in done.stdout


@pytest.mark.slow
def test_the_oldest_packages_run_it(tmp_path):
    """In an environment of its own, which brings gigabytes."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(next(path for path in (tmp_path / "venv" / "bin" / "python",
                                        tmp_path / "venv" / "Scripts" / "python.exe")
                                        if path.exists()))
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", str(ROOT / "tests" / "oldest.txt")],
                   check=True)
    shutil.copy(NOTEBOOK, tmp_path)
    assert "validation: GPT " in execute_notebook(tmp_path, python)


@pytest.mark.long
def test_prose_of_ones_own_runs_from_top_to_bottom(tmp_path):
    import inspect
    import statistics

    import unittest, argparse, logging, email.message, http.client, decimal
    paragraphs = [inspect.getdoc(value) or "" for module in (statistics, unittest, argparse,
        logging, email.message, http.client, decimal, os, json)
                  for value in vars(module).values()]
    (tmp_path / "own.txt").write_text("\n\n".join(dict.fromkeys(paragraphs)), encoding="utf-8")
    text = run_with(tmp_path, smoke_with(dict(corpus="own.txt", min_document_bytes=20,
                                              held_out_fraction=0.3)))
    assert "Once upon a time" in text and "20 functions each" not in text
    assert "The corpus is not Python: nothing to compile." in text and "whole game" not in text


# read before any test sets it
TIKTOKEN = pathlib.Path(os.environ.get("TIKTOKEN_CACHE_DIR")
                        or ROOT.parent / "shared" / "data" / "tiktoken")


@pytest.mark.slow
@pytest.mark.skipif(not TIKTOKEN.is_dir(),
                    reason="needs GPT-2's vocabulary, in TIKTOKEN_CACHE_DIR")
def test_gpt2s_vocabulary_runs_up_to_the_labs(tmp_path):
    """The labs train a dozen models: with 50,257 tokens they would take ten minutes."""
    settings = smoke_with(dict(tokenizer="gpt2", samples=5, max_steps=10))
    text = run_with(tmp_path, settings, before="## 13 ", TIKTOKEN_CACHE_DIR=str(TIKTOKEN))
    assert "vocabulary: 50,257 tokens" in text


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_the_checks_of_sections_1_to_8_pass_for_settings_at_random(seed, tmp_path, monkeypatch):
    rng = random.Random(seed)
    heads, width = rng.choice([(1, 2), (1, 64), (2, 16), (3, 96), (5, 320)])
    changes = dict(corpus_megabytes=0.3, held_out_fraction=0.2, n_head=heads, n_embd=width,
                   n_layer=rng.choice([1, 3]), vocab_size=rng.choice([320, 600]),
                   context_length=rng.choice([2, 3, 8, 64]),
                   position=rng.choice(["rotary", "none", "sinusoidal", "learned"]),
                   norm=rng.choice(["rmsnorm", "layernorm"]),
                   activation=rng.choice(["relu_squared", "gelu", "gelu_tanh"]),
                   dropout=rng.choice([0.0, 0.3]), optimizer=rng.choice(["muon", "adamw"]),
                   windows=rng.choice(["documents", "anywhere"]), batch_size=2,
                   accumulation_steps=rng.choice([1, 2]), max_steps=3, evaluations=1,
                   sample_tokens=16,
                   **{name: rng.random() < 0.5 for name in ("qk_norm", "bias", "tie_embeddings")})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: None)
    monkeypatch.setenv("GPT_PRESET", "smoke")
    space = run_cells(0, 8, smoke_with(changes))
    assert len(space["history"]["loss"]) == 3, changes


@pytest.mark.slow
@pytest.mark.long
def test_cells_run_twice_and_sections_again_in_other_orders(tmp_path):
    """Each cell of the story twice in a row; then, after the whole run, the sections backwards and
    in a shuffled order."""
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints",
                    ignore=shutil.ignore_patterns("*.lock"))
    notebook, cells = json.loads(NOTEBOOK.read_text(encoding="utf-8")), code_cells()
    sections = sorted({section for section, _ in cells} - {0, 13})
    order = [cell for section, cell in cells for _ in range(2 if section < 13 else 1)]
    for again in (sections[::-1], random.Random(0).sample(sections, len(sections))):
        order += [cell for wanted in again for section, cell in cells if section == wanted]
    notebook["cells"] = [{**cell, "id": f"cell{i}", "execution_count": None}
                         for i, cell in enumerate(order)]
    (tmp_path / NOTEBOOK.name).write_text(json.dumps(notebook), encoding="utf-8")
    assert execute_notebook(tmp_path).count("all 17 solutions are right") == 3


def test_the_whole_game_runs_as_a_file_of_its_own(tmp_path):
    """The code of section 1, copied out, needs nothing but torch and the standard library."""
    source = "\n\n".join("".join(cell["source"]) for section, cell in code_cells() if section == 1)
    imports = set(re.findall(r"^(?:import|from) (.*?)(?: import.*)?$", source, re.M))
    allowed = set("ast hashlib math os pathlib sysconfig time torch".split())
    assert {name for line in imports for name in line.split(", ")} <= allowed
    assert len([line for line in source.splitlines() if line.strip()]) <= 150
    (tmp_path / "game.py").write_text(source, encoding="utf-8")
    environment = {**os.environ, "GPT_PRESET": "smoke", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "game.py"], cwd=tmp_path, env=environment,
                          capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(re.search(r"The score to beat: ([\d.]+) bits", done.stdout).group(1)) < 6

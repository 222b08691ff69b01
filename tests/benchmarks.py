"""Measurements that are no tests: python tests/benchmarks.py memory --megabytes 64 256 1024

memory: a generated plain-text corpus of each size goes through sections 2–4 of the notebook, in a process of its own; printed
are its seconds and the most private memory that it held (resident pages that belong to no file).
"""
import argparse
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time

NOTEBOOK = pathlib.Path(__file__).resolve().parent.parent / "gpt_from_scratch.ipynb"

CHILD = """
import json, os, sys, builtins
os.environ["MPLBACKEND"] = "agg"
builtins.display = lambda *things: None
from matplotlib import pyplot
space = {"__name__": "trial"}
for source in json.load(open("cells.json", encoding="utf-8")):
    exec(compile(source, "cell", "exec"), space)
    pyplot.close("all")
print("TOKENS", len(space["train_tokens"]))
"""


def write_text(path, megabytes, seed=0):
    """Sentences of made-up words whose frequencies fall as in natural text (Zipf), so that no passage repeats."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("etaoinshrdlucmfwypvbgkjqxz") for _ in range(rng.randint(2, 9))) for _ in range(50_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            chosen = iter(rng.choices(words, weights, k=20_000))
            text = "".join(word + (".\n" if i % 15 == 14 else " ") + ("\n" if i % 90 == 89 else "") for i, word in enumerate(chosen))
            file.write(text)
            written += len(text)


def cells_up_to_section_5(corpus, megabytes):
    """Sources of the code cells of sections 0–4, with the parameters cell replaced."""
    sources = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and re.match(r"## 5 ", source):
            return sources
        if cell["cell_type"] == "code":
            if "parameters" in cell["metadata"].get("tags", []):
                source = f'preset = "laptop"\nchanges = dict(corpus={str(corpus)!r}, corpus_megabytes={float(megabytes) * 2})'
            sources.append(source)


def private_bytes(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * int(match.group(1)) if (match := re.search(r"RssAnon:\s+(\d+)", status)) else 0


def measure_memory(megabytes, folder):
    folder = pathlib.Path(folder)
    write_text(folder / "corpus.txt", megabytes)
    (folder / "cells.json").write_text(json.dumps(cells_up_to_section_5(folder / "corpus.txt", megabytes)), encoding="utf-8")
    start, most = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-c", CHILD], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        reader = threading.Thread(target=lambda: lines.extend(process.stdout))
        reader.start()
        while process.poll() is None:
            most = max(most, private_bytes(process.pid))
            time.sleep(0.05)
        reader.join()
    if process.returncode:
        raise SystemExit(f"{megabytes} MB failed:\n" + "".join(lines[-20:]))
    return time.perf_counter() - start, most, int(lines[-1].split()[1]), "".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory"])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--verbose", action="store_true", help="print what the cells printed")
    arguments = parser.parse_args()
    if not os.path.exists("/proc/self/status"):
        raise SystemExit("memory needs Linux: it reads /proc")
    print(f"{'MB':>6}{'seconds':>10}{'s per MB':>10}{'private GB':>12}{'training tokens':>18}")
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            seconds, most, tokens, text = measure_memory(megabytes, folder)
        print(f"{megabytes:6}{seconds:10.1f}{seconds / megabytes:10.2f}{most / 1e9:12.2f}{tokens:18,}", flush=True)
        if arguments.verbose:
            print(text)


if __name__ == "__main__":
    main()

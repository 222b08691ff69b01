"""Nothing lost, nothing let in: kills, full disks, damaged files, interrupts, stale state, bad input."""
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import torch

import referees
from conftest import NOTEBOOK, code_cells, execute_notebook, finish_notebook, load_library, start_notebook
from test_library import make_run

pytestmark = pytest.mark.faults
HERE = pathlib.Path(__file__).parent
TOKENS = torch.randint(300, (500,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer(library):
    return library.build_tokenizer(library.train_bpe(["def f(x):\n    return x + 1", "for item in items:\n        print(item)"] * 3, 300))


def same(a, b):
    """Equal to the bit, in nested containers of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# 1. Bit-exact resume

@pytest.mark.parametrize("optimizer, kill_after", [("muon", 1), ("muon", 7), ("adamw", 4)])
def test_killed_and_resumed_in_a_new_process_is_the_same_to_the_bit(library, tokenizer, tmp_path, monkeypatch, optimizer, kill_after):
    monkeypatch.setattr(library, "NOTEBOOK_FILE", str(NOTEBOOK))
    library.write_tokens(tmp_path / "t.bin", ["for item in items: print(item)"] * 30, tokenizer, "stamp")
    folders = [tmp_path / name for name in ("killed", "whole")]
    arguments = [[str(tmp_path / "t.bin"), "stamp", str(folder), 12, {"optimizer": optimizer}] for folder in folders]
    assert library.run_child(arguments[0], kill_after=kill_after)[-1] != "step 12"
    assert re.match(r"goes on after step \d+", library.run_child(arguments[0])[0])
    library.run_child(arguments[1])
    contents = [library.read_checkpoint(folder / "run.pt") for folder in folders]
    for content in contents:
        assert len(content["history"]["loss"]) == 12
        content["history"].pop("seconds")
    assert same(*contents)

    texts, batches = [], []                                      # what both write, and what both would read next
    for folder in folders:
        model, generator = library.GPT(library.GPTConfig(**contents[0]["config"])), torch.Generator()
        library.load_checkpoint(folder / "run.pt", model, generator=generator)
        texts.append(library.generate(model, tokenizer, "for", 40, seed=0))
        batches.append(library.get_batch(TOKENS, 2, 16, "cpu", generator))
    assert texts[0] == texts[1] and same(*batches)


def test_a_killed_run_loses_a_few_seconds_at_most(library):
    settings, model, optimizers, generator, history = make_run(library)
    saved_at = []
    library.train(model, optimizers, TOKENS, settings, history, generator, save=lambda: saved_at.append(len(history["loss"])),
                  save_every=0.1, report=lambda h: time.sleep(0.03))
    assert len(saved_at) >= 2 and max(b - a for a, b in zip([0] + saved_at, saved_at + [12])) <= 5
    assert library.train.__defaults__[-1] <= 10, "seconds between checkpoints of the main run"


def test_a_save_that_takes_long_is_made_less_often(library):
    """A large model's checkpoint takes seconds; every five seconds that would be half of the run."""
    settings, model, optimizers, generator, history = make_run(library)
    saved_at = []

    def save():
        saved_at.append(len(history["loss"]))
        time.sleep(0.2)
    library.train(model, optimizers, TOKENS, settings, history, generator, save=save, save_every=0.01, report=lambda h: time.sleep(0.03))
    assert len(saved_at) == 1 and saved_at[0] < 4                # twelve steps take less than the four seconds that must pass now


# 2. Atomic and durable

KILL_LOOP = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from conftest import load_library
import test_library
torch.set_num_threads(1)
lib, path, kills = load_library(), sys.argv[2], int(sys.argv[3])
settings, model, optimizers, generator, history = test_library.make_run(lib)
last, rng = 0, random.Random(int(sys.argv[3]))
for kill in range(kills):
    child = os.fork()
    if child == 0:
        step = last
        while True:
            step += 1
            lib.save_checkpoint(path, model, optimizers, step, history, settings, [], generator, "stamp")
    while not os.path.exists(path):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for file in (path, lib.previous_checkpoint(path)):      # each of the two is whole, or not there
        if os.path.exists(file):
            lib.read_checkpoint(file)
    step = lib.load_checkpoint(path, model, optimizers, generator)["step"]
    assert step >= last, (step, last)
    last = step
with lib.locked(path):
    pass
left = [name for name in os.listdir(os.path.dirname(path)) if name.endswith(".part")]
assert not left, left
print("kills", kills, "saves", last)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_valid_checkpoint_after_every_kill(tmp_path, kills):
    done = subprocess.run([sys.executable, "-c", KILL_LOOP, str(HERE), str(tmp_path / "run.pt"), str(kills)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > kills, "it must have saved between the kills"


@contextlib.contextmanager
def largest_file(size):
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(os.name != "posix", reason="needs limits on file sizes")
def test_a_disk_that_refuses_leaves_what_was_there(library, tokenizer, tmp_path):
    settings, model, optimizers, generator, history = make_run(library)
    path, tokens = tmp_path / "run.pt", tmp_path / "t.bin"
    library.save_checkpoint(path, model, optimizers, 1, history, settings, [], generator, "s")
    library.write_tokens(tokens, ["abc"], tokenizer, "s")
    before = {name: (tmp_path / name).read_bytes() for name in ("run.pt", "t.bin")}
    with largest_file(700):
        with pytest.raises(OSError, match="run.pt can't be written .*untouched"):
            library.save_checkpoint(path, model, optimizers, 2, history, settings, [], generator, "s")
        with pytest.raises(OSError, match="t.bin can't be written .*untouched"):
            library.write_tokens(tokens, ["abc def " * 500], tokenizer, "s")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_full_disk_is_said_and_the_run_goes_on(library, tmp_path, capsys):
    mount = tmp_path / "small"
    mount.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        settings, model, optimizers, generator, history = make_run(library)
        save = lambda: library.save_checkpoint(mount / "run.pt", model, optimizers, len(history["loss"]), history, settings, [], generator, "s") or "run.pt"
        measure = lambda step: (mount / "filler").write_bytes(b"x" * (390_000 - os.stat(mount / "run.pt").st_size)) and {} if step == 12 else {}
        library.train(model, optimizers, TOKENS, settings, history, generator, measure=measure, save=save)
        assert len(history["loss"]) == 12
        printed = capsys.readouterr().out
        assert re.search(r"run\.pt can't be written \(No space left on device\).*the run goes on; last good checkpoint: run\.pt, after step 3$", printed, re.M)
        assert library.load_checkpoint(mount / "run.pt", model)["step"] == 3
        assert sorted(os.listdir(mount)) == ["filler", "run.pt"]
    finally:
        subprocess.run(["umount", str(mount)])


@contextlib.contextmanager
def without_root():
    """Root may write and read everything; nobody may not."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that other users can enter."""
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_read_only_folder_is_said_and_the_run_goes_on(library, open_folder, capsys):
    settings, model, optimizers, generator, history = make_run(library)
    open_folder.chmod(0o555)
    save = lambda: library.save_checkpoint(open_folder / "run.pt", model, optimizers, 0, history, settings, [], generator, "s")
    with without_root():
        library.train(model, optimizers, TOKENS, settings, history, generator, measure=lambda step: {}, save=save)
    assert len(history["loss"]) == 12 and "run.pt can't be written (Permission denied)" in capsys.readouterr().out
    assert os.listdir(open_folder) == []


# 3. Safe to open

def saved(library, path):
    settings, model, optimizers, generator, history = make_run(library)
    library.save_checkpoint(path, model, optimizers, 3, history, settings, [(b"a", b"b")], generator, "stamp")
    return model, optimizers, generator


def sealed(library, body, version=None):
    """A file with a valid checksum around any body."""
    version = library.CHECKPOINT_VERSION if version is None else version
    return library.CHECKPOINT_MAGIC + version.to_bytes(4, "little") + hashlib.sha256(body).digest() + body


class Payload:
    def __reduce__(self):
        return os.mkdir, (str(Payload.target),)


def test_a_payload_never_runs(library, tmp_path):
    Payload.target = tmp_path / "ran"
    model, path = library.GPT(referees.small_config(library)), tmp_path / "evil.pt"
    buffer = io.BytesIO()
    torch.save({"config": Payload()}, buffer)
    for content, words in ((buffer.getvalue(), "does not begin as one"), (sealed(library, buffer.getvalue()), "nothing in it was run")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            library.load_checkpoint(path, model)
    assert not Payload.target.exists()


def test_foreign_checkpoints_are_refused_and_change_nothing(library, tmp_path, capsys):
    path = tmp_path / "run.pt"
    model, optimizers, generator = saved(library, path)
    good = path.read_bytes()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="another architecture: its n_layer is 2, but the settings say 3"):
        library.load_checkpoint(path, library.GPT(dataclasses.replace(model.config, n_layer=3)))
    with pytest.raises(ValueError, match="another tokenizer"):
        library.load_checkpoint(path, model, merges=[(b"a", b"c")])
    with pytest.raises(ValueError, match="optimisers"):
        library.load_checkpoint(path, model, optimizers[:1])
    content = torch.load(io.BytesIO(good[44:]), weights_only=True)
    for change, words in (({"model": {}}, "doesn't hold the parameters"), ({"history": 3}, "'history' is missing or of another type"),
                          ({"optimizers": content["optimizers"][::-1]}, "other optimisers")):
        buffer = io.BytesIO()
        torch.save({**content, **change}, buffer)
        path.write_bytes(sealed(library, buffer.getvalue()))
        with pytest.raises(ValueError, match=words):
            library.load_checkpoint(path, model, optimizers)
    path.write_bytes(sealed(library, good[44:], version=99))
    with pytest.raises(ValueError, match="version 99, but this notebook reads version 2"):
        library.load_checkpoint(path, model)
    assert same(before, model.state_dict())
    path.write_bytes(good)
    assert library.load_checkpoint(path, model, optimizers, generator, [(b"a", b"b")], "other stamp")["step"] == 3
    assert "another corpus" in capsys.readouterr().out


def test_a_damaged_checkpoint_gives_way_to_the_one_before(library, tmp_path, capsys):
    path = tmp_path / "run.pt"
    settings, model, optimizers, generator, history = make_run(library)
    for step in (1, 2, 3):
        library.save_checkpoint(path, model, optimizers, step, history, settings, [], generator, "s")
    path.write_bytes(path.read_bytes()[:-1])
    assert library.load_checkpoint(path, model)["step"] == 2
    assert "the one before is used" in capsys.readouterr().out and sorted(os.listdir(tmp_path)) == ["run.previous.pt", "run.pt"]
    path.unlink()
    assert library.load_checkpoint(path, model)["step"] == 2


def mutated(good, rng):
    data = bytearray(good)
    kind = rng.randrange(5)
    if kind == 0:                                            # one bit, anywhere
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:                                          # cut off
        del data[rng.randrange(len(data)):]
    elif kind == 2:                                          # a byte in the first hundred
        data[rng.randrange(min(100, len(data)))] = rng.randrange(256)
    elif kind == 3:                                          # a stretch of noise
        start = rng.randrange(len(data))
        data[start:start + 20] = rng.randbytes(20)
    else:                                                    # something put in
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data)


def test_fuzzed_files_never_load_wrongly(library, tokenizer, tmp_path):
    rng, refused = random.Random(0), 0
    path = tmp_path / "run.pt"
    model, _, _ = saved(library, path)
    expected = library.read_checkpoint(path)
    tokens = tmp_path / "t.bin"
    library.write_tokens(tokens, ["for item in items", "print(x)"] * 5, tokenizer, "stamp")
    expected_tokens, expected_size = library.read_tokens(tokens, "stamp")
    expected_tokens = expected_tokens.copy()
    for file, good in ((path, path.read_bytes()), (tokens, tokens.read_bytes())):
        for _ in range(1200):
            file.write_bytes(mutated(good, rng))
            try:
                if file == path:
                    assert same(library.read_checkpoint(file), expected)
                else:
                    found, size = library.read_tokens(file, "stamp")
                    assert np.array_equal(found, expected_tokens) and size == expected_size
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 2000


# 4. Interrupt is a feature

@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_the_stop_button_at_any_moment_loses_nothing(library, tmp_path, capsys):
    settings, model, optimizers, generator, whole = make_run(library)
    library.train(model, optimizers, TOKENS, settings, whole, generator)
    settings, again, optimizers, generator, history = make_run(library)
    save = lambda: library.save_checkpoint(tmp_path / "run.pt", again, optimizers, len(history["loss"]), history, settings, [], generator, "s")
    rng, presses = random.Random(1), 0
    while len(history["loss"]) < settings.max_steps:
        timer = threading.Timer(rng.uniform(0.001, 0.012), os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            library.train(again, optimizers, TOKENS, settings, history, generator, save=save)
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:       # pressed just before or after the call
            pass
        presses += 1
    assert presses > 1 and "interrupted after step" in capsys.readouterr().out
    assert history["loss"] == whole["loss"] and same(again.state_dict(), model.state_dict())


def test_the_stop_button_of_a_kernel(tmp_path):
    """What the button of JupyterLab does: it interrupts the kernel. The run cell goes on when it is run again."""
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(cwd=str(tmp_path), env={**os.environ, "GPT_PRESET": "smoke", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"})

    def execute(source):
        printed = []
        reply = client.execute_interactive(source, timeout=300, output_hook=lambda message: printed.append(message["content"].get("text", "")))
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed)
    try:
        run_cell = None
        for _, cell in code_cells():
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", []):
                source = 'preset = "smoke"\nchanges = dict(max_steps=2000, evaluations=2)'
            if "save, starts)" in source and "Progress(" in source:
                run_cell = source
                break
            execute(source)
        timer = threading.Timer(4, manager.interrupt_kernel)
        timer.start()
        text = execute(run_cell)
        steps = int(re.search(r"interrupted after step (\d+)", text).group(1))
        assert 0 < steps < 2000
        assert execute("print(len(history['loss']), tuple(model(train_tokens[None, :8].long())[0].shape))").startswith(f"{steps} (1, 8, ")
        timer = threading.Timer(4, manager.interrupt_kernel)
        timer.start()
        text = execute(run_cell)
        assert f"at step {steps} of 2000" in text and int(re.search(r"interrupted after step (\d+)", text).group(1)) > steps
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_an_interrupted_experiment_of_the_labs_goes_on(library, tmp_path, capsys):
    settings = library.make_settings("smoke", context_length=16, n_embd=16, batch_size=2, evaluations=2, dropout=0.1, lab_seconds=0.3,
                                     checkpoint_dir=str(tmp_path))

    def experiment(stop_at=None):
        def measure(model):
            if stop_at == len(seen):
                raise KeyboardInterrupt
            seen.append(1)
            return {}
        seen = []
        return library.experiment(settings, TOKENS, 299, 300, "stamp", torch.device("cpu"), torch.float32, measure)[1]
    begun = experiment(stop_at=1)
    steps = len(begun["loss"])
    (left,) = [path for path in tmp_path.glob("lab-*.pt") if "previous" not in path.name]
    planned = library.read_checkpoint(left)["settings"]["max_steps"]
    assert 0 < steps < planned
    whole = experiment()
    assert f"goes on after step {steps} of {planned}" in capsys.readouterr().out
    assert whole["loss"][:steps] == begun["loss"][:steps] and len(whole["loss"]) == planned
    assert not list(tmp_path.glob("*.pt"))


# 5. Numbers gone wrong

def test_the_error_names_step_cause_and_last_good_checkpoint(library):
    settings, model, optimizers, generator, history = make_run(library)

    def sabotage(h):
        if len(h["loss"]) == 5:
            with torch.no_grad():
                model.final_norm.weight[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"^step 5: .*final_norm.weight is no longer finite. Last good checkpoint: here, after step 3$"):
        library.train(model, optimizers, TOKENS, settings, history, generator, measure=lambda step: {}, report=sabotage, save=lambda: "here")
    assert len(history["loss"]) == 5


@pytest.mark.parametrize("precision, words", [
    (torch.float32, "the data: most windows of the text are fine, but not the one that begins with the tokens [7, 5, 5, 5, 5]"),
    (torch.float16, "the precision: in float32 the same step is finite, in float16 it is not"),
    (torch.float32, "a learning rate too high (now ")])
def test_the_cause_is_told_apart(library, precision, words):
    settings, model, optimizers, generator, history = make_run(library)
    tokens, starts, forward = torch.full((400,), 5), None, model.forward
    if "data" in words:                                 # one window of the text that the model can't digest
        tokens[300], starts = 7, torch.tensor([0] * 50 + [300])
        model.forward = lambda inputs, targets: (None, forward(inputs, targets)[1] * (math.nan if 7 in inputs else 1.0))
    elif "precision" in words:                          # fits float32, not float16
        model.final_norm.weight.data.fill_(1e5)
    else:
        model.forward = lambda inputs, targets: (None, forward(inputs, targets)[1] * math.inf)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError) as error:
        for _ in range(400):
            library.training_step(model, [], tokens, settings, 3, generator, precision, starts)
    assert words in str(error.value) and all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


# 6. Stale state

def test_the_ledger_names_the_section_to_run_again(library):
    ledger, settings = library.Ledger(), library.make_settings("smoke")
    with pytest.raises(library.StaleStateError, match="^section 2 has not been run yet"):
        ledger.need(settings, 4)
    for section, stamp in ((2, None), (4, "a"), (8, "a"), (9, "a")):
        ledger.ran(section, settings, stamp)
    ledger.need(settings, 9)
    ledger.need(dataclasses.replace(settings, samples=7), 9)
    for changes, section in ((dict(corpus="shakespeare"), 2), (dict(vocab_size=600), 4), (dict(n_layer=3), 8), (dict(max_steps=9), 9)):
        with pytest.raises(library.StaleStateError, match=f"^{next(iter(changes))} is now .* but section {section} was run with .*from section {section} on$"):
            ledger.need(dataclasses.replace(settings, **changes), 9)
    ledger.ran(4, settings, "b")
    with pytest.raises(library.StaleStateError, match="section 4 has made other tokens since section 8 was run"):
        ledger.need(settings, 9)


def execute_cells(folder, cells):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    copies = [{**cell, "id": f"cell-{i}"} for i, cell in enumerate(cells)]
    (folder / "trial.ipynb").write_text(json.dumps({**notebook, "cells": copies}), encoding="utf-8")
    return execute_notebook(folder, "trial.ipynb")


@pytest.mark.long
def test_every_cell_twice_and_sections_in_any_order(tmp_path):
    cells = code_cells()
    order = [cell for number, cell in cells if number < 13 for _ in range(2)]
    for section in (12, 10, 8, 11, 9, 12, 8, 10):
        order += [cell for number, cell in cells if number == section]
    text = execute_cells(tmp_path, order)
    scores = re.findall(r"^GPT: ([\d.]+) nats", text, re.M)
    assert len(scores) == 4 and len(set(scores)) == 1
    forms = re.findall(r"^GPT .*% to .*$", text, re.M)
    assert len(forms) == 4 and len(set(forms)) == 1


def test_a_changed_setting_without_the_cells_between_is_one_sentence(tmp_path):
    cells = code_cells()
    probe = dict(cell_type="code", metadata={}, outputs=[], execution_count=None)
    order = [cell for number, cell in cells if number < 5]
    for number, changes in ((8, "vocab_size=400"), (9, "n_embd=32"), (10, "max_steps=3"), (11, "n_layer=1"), (12, "corpus='shakespeare'")):
        first = next(cell for n, cell in cells if n == number and cell["metadata"].get("tags", []) == [] and "ledger.need" in "".join(cell["source"]))
        order.append({**probe, "source": f"settings = make_settings('smoke', {changes})\ntry:\n    exec({''.join(first['source'])!r})\n"
                                         f"except StaleStateError as error:\n    print({number}, error)"})
    text = execute_cells(tmp_path, order)
    for number, words in ((8, "vocab_size is now 400, but section 4 was run with 512"), (9, "section 8 has not been run yet"),
                          (12, "corpus is now 'shakespeare', but section 2 was run with 'python'")):
        assert f"{number} {words}" in text
    assert text.count("section") >= 5


# 7. Two notebooks at once

def test_a_second_run_gets_a_checkpoint_of_its_own(library, tmp_path, capsys):
    with library.locked(tmp_path / "run.pt") as first:
        with library.locked(tmp_path / "run.pt") as second, library.locked(tmp_path / "run.pt") as third:
            assert [p.name for p in (first, second, third)] == ["run.pt", "run-2.pt", "run-3.pt"]
    with library.locked(tmp_path / "run.pt") as again:
        assert again.name == "run.pt"
    assert capsys.readouterr().out.count("another notebook is training this very run") == 2


@pytest.mark.long
def test_two_notebooks_in_one_folder_at_once(tmp_path):
    shutil.copy(NOTEBOOK, tmp_path)
    outputs = ["out0.ipynb", "out1.ipynb"]       # one thread each: two processes that spin on two cores slow each other down
    runs = [start_notebook(tmp_path, output=output, OMP_NUM_THREADS="1") for output in outputs]
    scores = [re.search(r"^GPT: ([\d.]+) nats", finish_notebook(run, tmp_path, output), re.M).group(1) for run, output in zip(runs, outputs)]
    assert scores[0] == scores[1]
    assert not [p for p in tmp_path.rglob("*.part")]
    library = load_library()
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        library.read_checkpoint(path)


# 8. Bad input

def documents_of(library, tmp_path, pattern, **changes):
    return library.load_documents(library.make_settings("smoke", corpus=str(pattern), data_dir=str(tmp_path / "data"), **changes))


@pytest.mark.parametrize("content, words", [
    (b"\xff\xfeh\x00i\x00", "line 1 holds the byte 0xff; it looks like UTF-16"), (b"fine\nnot \xe9 fine\n", "line 2 holds the byte 0xe9"),
    (b"", "no text was found"), (b" \n\n", None), (b"x", None)])
def test_bad_files_get_one_sentence(library, tmp_path, content, words):
    (tmp_path / "bad.txt").write_bytes(content)
    if words:
        with pytest.raises(ValueError, match=words) as error:
            documents_of(library, tmp_path, tmp_path / "bad.txt")
        assert "\n" not in str(error.value)
    else:
        documents = documents_of(library, tmp_path, tmp_path / "bad.txt")
        with pytest.raises(ValueError, match="^corpus leaves the train|^corpus leaves the validation"):
            library.split_documents(documents, 0.1)


@pytest.mark.parametrize("content, words", [(b'{"text": "a"}\n{"text": ', "is no readable .jsonl file"), (b'{"title": "a"}\n', "no column 'text'"),
                                            (b'{"text": 3}\n', "column 'text'.*holds int")])
def test_bad_jsonl_gets_one_sentence(library, tmp_path, content, words):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        documents_of(library, tmp_path, tmp_path / "bad.jsonl")
    assert "\n" not in str(error.value)


def test_bad_parquet_gets_one_sentence(library, tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match="bad.parquet") as error:
        documents_of(library, tmp_path, tmp_path / "bad.parquet")
    assert "\n" not in str(error.value)


def test_one_line_of_50_megabytes_is_cut_into_passages(library, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * 10_000_000, encoding="utf-8")
    texts = documents_of(library, tmp_path, path, corpus_megabytes=100.0)["text"]
    lengths = [len(text) for text in texts]
    assert sum(lengths) == 50_000_000 and max(lengths) <= 3000 and all(text.endswith(" ") for text in texts[:100])


def test_passages_keep_every_character(library):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["word ", "\n", "\n\n", "x" * rng.randrange(1, 90), "\t"]) for _ in range(rng.randrange(0, 60)))
        pieces = list(library.passages(text.splitlines(keepends=True), size=20))
        assert "".join(pieces) == text and all(len(piece) <= 80 for piece in pieces)


def test_nul_bytes_and_lone_surrogates_are_cleaned(library, tmp_path):
    (tmp_path / "nul.txt").write_bytes(b"one\x00two\r\nthree  \n")
    row = library.normalise(documents_of(library, tmp_path, tmp_path / "nul.txt")[0])
    assert row == {"text": "onetwo\nthree", "bytes": 12}
    assert library.normalise({"text": "a\ud800b"})["text"] == "a?b"


@pytest.mark.parametrize("corpus", ["", "no such folder", "*.nothing", r"C:\Users\me\texts", "python "])
def test_corpora_that_are_not_there(library, corpus):
    with pytest.raises(ValueError, match="^corpus is .*but it must be one of python"):
        library.make_settings(corpus=corpus)


def test_a_folder_without_text(library, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "picture.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="^corpus is .*no file of type .txt"):
        documents_of(library, tmp_path, tmp_path / "texts")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_file_that_may_not_be_read(library, open_folder):
    path = open_folder / "secret.txt"
    path.write_text("secret")
    path.chmod(0)
    with without_root(), pytest.raises(ValueError, match="secret.txt' can't be read .Permission denied"):
        list(library.read_own_files(str(path)))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_data_folder_that_may_not_be_written(library, open_folder):
    (open_folder / "a.txt").write_text("some text")
    settings = library.make_settings("smoke", corpus=str(open_folder / "a.txt"), data_dir=str(open_folder / "data"))
    with without_root(), pytest.raises(ValueError, match="^data_dir is .*can't be written to"):
        library.load_documents(settings)


@pytest.mark.parametrize("prompt", ["", "x" * 100_000, "🎉🎉", "<|endoftext|>", "a\ud800b", "\x00"])
def test_any_prompt_works_and_is_text(library, tokenizer, prompt):
    model = library.GPT(referees.small_config(library, vocab_size=tokenizer.n_vocab))
    assert library.generate(model, tokenizer, prompt, 3, seed=0)[0].startswith(prompt)
    ids = library.encode_prompt(tokenizer, prompt)
    assert ids[0] == tokenizer.eot_token and tokenizer.eot_token not in ids[1:]


@pytest.mark.parametrize("options", [dict(prompt=None), dict(samples=0), dict(max_new_tokens=-1), dict(max_new_tokens=2.5), dict(seed=-1), dict(seed="x"),
                                     dict(temperature=-0.5), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=0), dict(top_p=0.0),
                                     dict(top_p=1.01), dict(min_p=0)])
def test_bad_knobs_get_one_sentence(library, tokenizer, options):
    model = library.GPT(referees.small_config(library, vocab_size=tokenizer.n_vocab))
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is .*but it must be") as error:
        library.generate(model, tokenizer, **{"prompt": "x", "max_new_tokens": 2, **options})
    assert "\n" not in str(error.value)


def test_top_k_above_the_vocabulary_keeps_all(library):
    logits = torch.randn(50)
    assert torch.equal(library.filter_logits(logits, top_k=10**6), logits)

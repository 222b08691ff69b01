"""Section 14 and what it leans on: large texts, precision, compiled steps, several processes."""
import dataclasses, os, pathlib, re, shutil, signal, subprocess, sys, types

import numpy as np
import pytest
import torch

import referees
from conftest import NOTEBOOK, run_cells


def trained(library, device="cpu", precision=torch.float32, **changes):
    """(model, losses) of a short run on made-up tokens, as section 8 trains."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(200, (4000,), generator=generator) ** 2 // 200  # small ones are frequent
    run = referees.small_run(library, 200, device, precision, context_length=32, n_embd=32,
                             batch_size=16, **changes)
    run.forward = library.compiled(run.model, run.settings)
    return run.model, library.train(run, tokens, show=False)["loss"]


@pytest.mark.long
def test_tinystories_in_the_hubs_layout_is_prepared_and_trained_on(
        library, tmp_path, monkeypatch, capsys):
    """Sections 0 to 10 with the gpu preset, whose corpus it is, and a small model."""
    rng, words = np.random.default_rng(0), np.array([f"w{i}" for i in range(3000)])
    texts = ["Once upon a time, " + " ".join(words[rng.zipf(1.4, 150) % 3000]) + "."
             for _ in range(600)]
    folder = tmp_path / "stories" / "data"
    folder.mkdir(parents=True)
    for part in range(3):
        table = library.datasets.Dataset.from_dict({"text": texts[part::3]})
        table.to_parquet(str(folder / f"train-{part:05}-of-00003.parquet"))
    held_back = library.datasets.Dataset.from_dict({"text": ["HELD BACK BY THE HUB"]})
    held_back.to_parquet(str(folder / "validation-00000-of-00001.parquet"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_PRESET", "smoke")
    nothing = lambda *a, **k: types.SimpleNamespace(update=lambda *a, **k: None)
    monkeypatch.setattr("IPython.display.display", nothing)
    settings = ('preset = "gpu"\nchanges = dict(device="cpu", held_out_fraction=0.06, '
                'vocab_size=400, context_length=32, n_layer=1, n_head=1, n_embd=32, '
                'batch_size=8, max_steps=60, evaluations=2, samples=5, sample_tokens=32)')
    replace = [('"roneneldan/TinyStories"', repr(str(folder.parent))),
               ('os.environ["GPT_PRESET"] = preset', "pass")]
    space = run_cells(0, 10, settings, replace, without=("check", "exercise"))
    assert "corpus: tinystories" in capsys.readouterr().out
    assert set(space["documents"]["text"]) == set(texts)
    losses = space["history"]["loss"]
    assert len(losses) == 60 and sum(losses[-10:]) / 10 < losses[0] - 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_a_run_follows_the_cpus(library):
    here, there = (trained(library, device, compile="no")[1] for device in ("cpu", "cuda"))
    assert max(abs(a - b) for a, b in zip(here, there)) < 0.02


@pytest.fixture
def compiler(library, monkeypatch):
    # torch.compile asks for the module of a function by its name
    monkeypatch.setitem(sys.modules, "notebook_library", library)
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(3))
    except Exception:
        pytest.skip("needs a C++ compiler for torch.compile")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_run_follows_the_plain_one_and_shares_its_weights(library, compiler, precision):
    plain = trained(library, compile="no", precision=precision)[1]
    model, compiled = trained(library, compile="yes", precision=precision)
    assert max(abs(a - b) for a, b in zip(plain, compiled)) < 3e-3 and plain[-1] < plain[0]
    assert not any(name.startswith("_orig_mod") for name in model.state_dict())


# Several processes

@pytest.fixture
def order(library, tmp_path):
    """Writes a run before its first step in a folder with the notebook and a token file."""
    shutil.copy(NOTEBOOK, tmp_path / "gpt_from_scratch.ipynb")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef \n"), 60)) for _ in range(300)]
    merges = library.train_bpe(texts, 280)
    encoding = library.build_tokenizer(merges)

    def write(name="run.pt", **changes):
        precision = changes.pop("precision", "float32")
        run = referees.small_run(library, encoding.n_vocab, precision=getattr(torch, precision),
                                 **{**dict(batch_size=4, context_length=32, n_embd=32, n_layer=1,
                                           max_steps=50, device="cpu"), **changes})
        run.settings = dataclasses.replace(run.settings, precision=precision)
        library.save_checkpoint(tmp_path / name, run, merges, "stamp")
        return run
    write.folder = tmp_path
    write.tokens = library.load_tokens(tmp_path / "data/tokens/stamp-train.npy", texts, encoding)
    return write


def start_together(library, folder, name="run.pt", processes=2):
    return subprocess.Popen(library.together_command(name, processes), cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="torch's wheels for Windows lack what torchrun needs")
@pytest.mark.parametrize("changes", [
    {}, dict(optimizer="adamw", accumulation_steps=2, windows="anywhere"),
    dict(precision="bfloat16")], ids=str)
def test_two_processes_follow_the_curve_of_one(library, order, changes):
    name = "a folder's \"name\" with \\ in it/run.pt"
    order(name)
    run = order(name, **changes, learning_rate=0.005)       # ordered again: the new rate is used
    alone = library.train(run, order.tokens, show=False)["loss"]
    process = start_together(library, order.folder, name)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    content = library.read_checkpoint(order.folder / name)
    loose = changes.get("precision") == "bfloat16"
    together = content["history"]["loss"]
    assert max(abs(a - b) for a, b in zip(alone, together, strict=True)) < (0.02 if loose else 2e-4)
    differences = [float((p - content["model"][n]).abs().max())
                   for n, p in run.model.state_dict().items()]
    assert max(differences) < (0.1 if loose else 2e-3)


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux: it reads /proc")
def test_a_killed_process_leaves_a_checkpoint_and_another_number_goes_on(library, order):
    run, path = order(max_steps=30), order.folder / "run.pt"
    for name, value in zip(("loss", "norm", "rate"), library.training_step(run, order.tokens)):
        run.history[name].append(value)
    run.settings = dataclasses.replace(run.settings, max_steps=100_000)
    library.save_checkpoint(path, run, library.read_checkpoint(path)["merges"], "stamp")
    process = start_together(library, order.folder)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:
        assert process.poll() is None
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    kept = library.read_checkpoint(path)["history"]["loss"]
    assert process.returncode and len(kept) >= 1
    run.settings = dataclasses.replace(run.settings, max_steps=len(kept) + 10)
    library.save_checkpoint(path, run, library.read_checkpoint(path)["merges"], "stamp")
    printed, _ = start_together(library, order.folder, processes=1).communicate(timeout=300)
    assert len(library.read_checkpoint(path)["history"]["loss"]) == len(kept) + 10, printed[-3000:]


def test_a_batch_that_can_not_be_shared_is_refused(library, order):
    order(batch_size=3)
    printed, _ = start_together(library, order.folder).communicate(timeout=120)
    assert re.search(r"batch_size is 3", printed)


def test_large_models_have_their_published_sizes(library):
    published = {"GPT-2 small": 124, "GPT-2 XL": 1558}
    for name, millions in published.items():
        config = library.BIG_MODELS[name]
        assert round(library.parameter_formula(config) / 1e6) == millions
    assert library.parameter_formula(library.GPTConfig()) == 124_439_808

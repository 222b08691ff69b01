"""Section 14 and what it leans on: large texts, devices, compiled steps, several processes, and the arithmetic of large models."""
import math, os, pathlib, re, shlex, shutil, signal, subprocess, sys, types

import numpy as np
import pytest
import torch

from conftest import NOTEBOOK, cells_of_sections


def small_run(library, device="cpu", precision=torch.float32, **changes):
    """(model, losses) of a short run on made-up tokens, as section 9 trains."""
    settings = library.make_settings("smoke", **{"max_steps": 10, "context_length": 32, "n_layer": 1, "n_embd": 32, **changes})
    tokens = torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0)) ** 2 // 200      # small ones are frequent: there is something to learn
    torch.manual_seed(0)
    model = library.GPT(library.make_config(settings, 200)).to(device)
    history = library.train(library.compiled(model, settings), library.make_optimizers(model, settings, precision), tokens, settings, library.new_history(),
                            torch.Generator().manual_seed(0), precision)
    return model, history["loss"]


# A bigger text

@pytest.mark.long
def test_tinystories_in_the_hubs_layout_is_prepared_and_trained_on(library, tmp_path, monkeypatch, capsys):
    """Sections 0 to 11 with the gpu preset, whose corpus it is, and a small model; the validation part of the hub must not be read."""
    rng, words = np.random.default_rng(0), np.array([f"w{i}" for i in range(3000)])
    texts = ["Once upon a time, " + " ".join(words[rng.zipf(1.4, 150) % 3000]) + "." for _ in range(600)]
    folder = tmp_path / "stories" / "data"
    folder.mkdir(parents=True)
    for part in range(3):
        library.datasets.Dataset.from_dict({"text": texts[part::3]}).to_parquet(str(folder / f"train-{part:05}-of-00003.parquet"))
    library.datasets.Dataset.from_dict({"text": ["HELD BACK BY THE HUB"]}).to_parquet(str(folder / "validation-00000-of-00001.parquet"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: types.SimpleNamespace(update=lambda *a, **k: None))
    space = {"__name__": "run"}
    for source, tags in cells_of_sections(0, 11, without={"check", "exercise"}):
        if "parameters" in tags:
            source = ('preset = "gpu"\nchanges = dict(device="cpu", held_out_fraction=0.06, vocab_size=400, context_length=32, n_layer=1, n_head=1, n_embd=32, batch_size=8, '
                      'max_steps=60, evaluations=2, samples=5, sample_tokens=32)')
        exec(compile(source.replace('"roneneldan/TinyStories"', repr(str(folder.parent))), "cell", "exec"), space)
    assert "corpus: tinystories" in capsys.readouterr().out and set(space["documents"]["text"]) == set(texts)
    assert set(space["tokenizer"].decode(space["train_tokens"].tolist()).split("<|endoftext|>")) - {""} <= set(texts)
    assert len(losses := space["history"]["loss"]) == 60 and sum(losses[-10:]) / 10 < losses[0] - 1
    written = space["generate"](space["model"], space["tokenizer"], "Once upon a time", 20, seed=1)[0]
    assert len(written) > 20


# Devices

@pytest.mark.parametrize("damage", [2.0, math.nan, None])
def test_a_device_that_fails_or_computes_other_numbers_is_noticed(library, monkeypatch, damage):
    config, real = library.GPTConfig(60, 32, 2, 2, 16), library.GPT.to
    assert library.device_error(config, torch.device("cpu")) == 0.0

    def slightly_wrong(model, device):
        if damage is None:
            raise RuntimeError("MPS backend out of memory")
        model.final_norm.weight.data[3] *= damage
        return real(model, device)
    monkeypatch.setattr(library.GPT, "to", slightly_wrong)
    assert not library.device_error(config, torch.device("cpu")) < 0.02


def test_a_device_without_bfloat16_trains_in_float32(library, monkeypatch):
    def rate(dtype, device):
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported on MPS")
        return 100.0
    monkeypatch.setattr(library, "matmul_rate", rate)
    for precision in ("auto", "float32"):
        assert library.choose_precision(library.make_settings(precision=precision), torch.device("mps"))[0] == torch.float32
    with pytest.raises(ValueError, match="precision is 'bfloat16', but mps here knows only 'float32'"):
        library.choose_precision(library.make_settings(precision="bfloat16"), torch.device("mps"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_a_run_follows_the_cpus(library):
    assert max(abs(a - b) for a, b in zip(*(small_run(library, device, compile="no")[1] for device in ("cpu", "cuda")))) < 0.02


@pytest.fixture
def compiler(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "notebook_library", library)     # torch.compile asks for the module of a function by its name
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(3))
    except Exception:
        pytest.skip("needs a C++ compiler for torch.compile")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_run_follows_the_plain_one_and_shares_its_weights(library, compiler, precision):
    (_, plain), (model, compiled) = (small_run(library, compile=choice, precision=precision) for choice in ("no", "yes"))
    assert max(abs(a - b) for a, b in zip(plain, compiled)) < 3e-3 and plain[-1] < plain[0]
    torch.manual_seed(0)
    assert all(not torch.equal(a, b) for a, b in zip(library.GPT(model.config).parameters(), model.parameters()))
    assert not any(name.startswith("_orig_mod") for name in model.state_dict())


def test_a_compiled_step_is_compiled_once(library, compiler):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    small_run(library, compile="yes", precision=torch.bfloat16)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2      # the trial, and the model


def test_without_a_compiler_steps_are_plain(library, monkeypatch, capsys):
    def no_compiler(function):
        raise RuntimeError("Cannot find a working triton installation\nand more")
    monkeypatch.setattr(torch, "compile", no_compiler)
    model = torch.nn.Linear(2, 2)
    assert library.compiled(model, library.make_settings(compile="yes")) is model
    assert re.fullmatch(r"torch.compile does not work here \(.*\); training goes on without it\n", capsys.readouterr().out)
    assert library.compiled(model, library.make_settings()) is model and not capsys.readouterr().out


# Several processes

@pytest.fixture
def order(library, tmp_path):
    """Writes an order in a folder with the notebook, where a token file lies; .folder, .tokens, .merges."""
    shutil.copy(NOTEBOOK, tmp_path / "gpt_from_scratch.ipynb")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef \n"), 60)) for _ in range(300)]
    merges = library.train_bpe(texts, 280)
    encoding = library.build_tokenizer(merges)

    def write(folder="together", precision=torch.float32, **changes):
        changes = {"batch_size": 4, "context_length": 32, "n_layer": 1, "n_embd": 32, "max_steps": 50, "device": "cpu", "data_dir": str(tmp_path / "data"), **changes}
        settings = library.make_settings("smoke", **changes)
        library.write_order(tmp_path / folder, settings, encoding.n_vocab, merges, "stamp", precision)
        return settings
    write.folder, write.merges, write.encoding = tmp_path, merges, encoding
    write.tokens = torch.from_numpy(library.load_tokens(tmp_path / "data" / "tokens", "stamp-train", texts, encoding))
    return write


def start_together(library, folder, name="together", processes=2):
    return subprocess.Popen(library.together_command(name, processes), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="torch's wheels for Windows lack what torchrun needs")
@pytest.mark.parametrize("changes", [{}, dict(optimizer="adamw", accumulation_steps=2, windows="anywhere"), dict(precision=torch.bfloat16),
                                     pytest.param(dict(compile="yes"), marks=pytest.mark.slow)], ids=str)
def test_two_processes_follow_the_curve_of_one(library, order, changes, request):
    if changes.get("compile"):
        request.getfixturevalue("compiler")
    name, precision = "a folder's \"name\" with \\ in it", changes.get("precision", torch.float32)
    settings = order(name, **changes)
    starts = library.window_starts(order.tokens, order.encoding.eot_token, settings.context_length) if settings.windows == "documents" else None
    torch.manual_seed(settings.seed)
    model = library.GPT(library.make_config(settings, order.encoding.n_vocab))
    alone = library.train(model, library.make_optimizers(model, settings, precision), order.tokens, settings, library.new_history(),
                          torch.Generator().manual_seed(settings.seed), precision, starts)["loss"]
    process = start_together(library, order.folder, name)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    assert sorted(path.name for path in (order.folder / name).iterdir()) == ["together.previous.pt", "together.pt"]      # rank 0 alone wrote
    content = library.read_checkpoint(order.folder / name / "together.pt")
    loose = precision != torch.float32
    assert max(abs(a - b) for a, b in zip(alone, content["history"]["loss"], strict=True)) < (0.02 if loose else 2e-4)
    assert max(float((p - content["model"][name]).abs().max()) for name, p in model.state_dict().items()) < (0.1 if loose else 2e-3)
    assert content["merges"] == order.merges and printed.count("saved") == 4


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux: it reads /proc")
def test_a_killed_process_ends_the_run_with_a_sentence_and_the_same_command_goes_on(library, order):
    order(max_steps=100_000)
    process, path = start_together(library, order.folder), order.folder / "together" / "together.pt"
    for line in process.stdout:
        if "step 40:" in line:
            child = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
            os.kill(int(child), signal.SIGKILL)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode and re.search(r"process \d ends with the others; the same command goes on from \S*together.pt", rest), rest[-3000:]
    kept = library.read_checkpoint(path)["history"]["loss"]
    assert len(kept) >= 40 and len(kept) % 20 == 0
    order(max_steps=len(kept) + 10)                         # writing the order again loses nothing
    process = start_together(library, order.folder, processes=1)      # and another number of them goes on, and says so
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"processes was 2 until step {len(kept)}, now it is 1" in printed, printed[-3000:]
    history = library.read_checkpoint(path)["history"]["loss"]
    assert len(history) == len(kept) + 10 and history[:len(kept)] == kept


def test_a_batch_that_can_not_be_shared_is_refused(library, order, monkeypatch):
    order(batch_size=3)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="batch_size is 3, which 2 processes can't share evenly"):
        library.train_together(order.folder / "together")


def test_the_documented_command_is_one_line_that_needs_no_file(library):
    command = library.together_command("a folder", 8)
    assert command[1:4] == ["-m", "torch.distributed.run", "--standalone"] and "--nproc-per-node=8" in command and command[-1] == "a folder"
    documented = re.search(r"^torchrun .*$", (NOTEBOOK.parent / "README.md").read_text(encoding="utf-8"), re.M).group(0)
    assert shlex.split(documented)[-2:] == [command[-2], "checkpoints/together"] and ".py" not in documented


# What it would take

def test_large_models_have_their_published_sizes(library):
    millions = {name: round(library.parameter_formula(config) / 1e6) for name, config in library.BIG_MODELS.items()}
    assert millions == {"GPT-2 small": 124, "GPT-2 medium": 355, "GPT-2 large": 774, "GPT-2 XL": 1558, "a 7B model": millions["a 7B model"]}
    assert 6500 < millions["a 7B model"] < 7500


def test_what_it_takes_by_hand(library):
    takes, parameters = library.what_it_takes(library.GPTConfig(), rate=1e12), 124_439_808
    flops = 20 * parameters * (6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 1024 * 768)
    assert np.allclose(list(takes.values()), [parameters / 1e6, 20 * parameters / 1e9, 16 * parameters / 1e9, flops / 1e12 / 3600])

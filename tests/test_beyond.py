"""Section 14 and what it leans on: large texts, devices, compiled steps, several processes, and the arithmetic of large models."""
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

from conftest import NOTEBOOK, cells_of_sections, load_library

CPU, TOKENS = torch.device("cpu"), torch.arange(100)


# A bigger text

def hub_folder(library, folder, stories=1500, seed=0, **more):
    """A data set in the hub's layout: README.md with its size, data/train-….parquet in shards, and a validation part that must not be read."""
    rng = np.random.default_rng(seed)
    words = np.array([f"w{i}" for i in range(3000)])
    texts = ["Once upon a time, " + " ".join(words[rng.zipf(1.4, 150) % 3000]) + "." for _ in range(stories)]
    size = sum(len(text) for text in texts)
    (folder / "data").mkdir(parents=True)
    for part in range(3):
        library.datasets.Dataset.from_dict({"text": texts[part::3]}).to_parquet(str(folder / f"data/train-{part:05}-of-00003.parquet"))
    library.datasets.Dataset.from_dict({"text": ["HELD BACK BY THE HUB"]}).to_parquet(str(folder / "data/validation-00000-of-00001.parquet"))
    (folder / "README.md").write_text(f"---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n    num_bytes: {size}\n    num_examples: {stories}\n"
                                      f"  - name: validation\n    num_bytes: 20\n    num_examples: 1\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
                                      f"  - split: validation\n    path: data/validation-*\n---\n# Stories\n")
    return texts, size


def test_tinystories_in_the_hubs_layout_is_prepared_and_trained_on(library, tmp_path, monkeypatch, capsys):
    """Sections 0 to 12 with the gpu preset, whose corpus it is, and a small model; the size from which on times are announced is lowered for the test."""
    texts, size = hub_folder(library, tmp_path / "stories")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: types.SimpleNamespace(update=lambda *a, **k: None))
    space = {"__name__": "run", "display": lambda *a, **k: None}
    for source, tags in cells_of_sections(0, 12, without={"exercise"}):
        if "parameters" in tags:
            source = ('preset = "gpu"\nchanges = dict(device="cpu", vocab_size=400, context_length=32, n_layer=1, n_head=1, n_embd=32, batch_size=8, '
                      'max_steps=60, evaluations=2, sample_tokens=32)')
        exec(compile(source, "cell", "exec"), space)
        if 'TINYSTORIES = "' in source:
            space["TINYSTORIES"] = str(tmp_path / "stories")
        if "LARGE_CORPUS =" in source:
            space["LARGE_CORPUS"] = 1e5
    printed = capsys.readouterr().out
    assert "corpus: tinystories" in printed
    reading, preparing = re.findall(r"takes (\d+) s per GB, by a sample of [\d.]+ MB: about ([\d.]+) minutes for ([\d.]+) GB", printed)
    assert float(reading[2]) == float(preparing[2]) == round(size / 1e9, 2) and int(reading[0]) > 0 and int(preparing[0]) > 0
    assert printed.index("reading takes") < printed.index("documents from") < printed.index("this section takes") < printed.index("normalised")
    assert re.search(r"MB, read at \d+ s per GB", printed) and re.search(r"prepared at \d+ s per GB", printed)
    read = set(space["documents"]["text"])
    assert read == set(texts) and "HELD BACK BY THE HUB" not in read
    tokens, encoding = space["train_tokens"], space["tokenizer"]
    assert set(encoding.decode(tokens.tolist()).split("<|endoftext|>")) - {""} <= set(texts)
    assert len(space["splits"]["train"]) > len(space["splits"]["validation"]) > 0
    losses = space["history"]["loss"]
    assert len(losses) == 60 and sum(losses[-10:]) / 10 < losses[0] - 1
    assert space["report"]["validation"]["GPT"] < space["report"]["validation"]["uniform"] and "form" not in space["report"]
    written = space["generate"](space["model"], encoding, "Once upon a time", 20, seed=1)[0]
    assert written.startswith("Once upon a time") and len(written) > 20


def test_the_size_of_a_text_is_known_before_it_is_read(library, tmp_path, monkeypatch):
    _, size = hub_folder(library, tmp_path / "stories", stories=30)
    assert library.hub_bytes(str(tmp_path / "stories")) == size
    assert library.hub_bytes(str(tmp_path / "nothing")) is None
    monkeypatch.setattr(library, "TINYSTORIES", str(tmp_path / "stories"))
    assert library.expected_bytes(library.make_settings(corpus="tinystories")) == size
    assert library.expected_bytes(library.make_settings(corpus="tinystories", corpus_megabytes=0.001)) == 1000
    monkeypatch.setattr(library, "TINYSTORIES", str(tmp_path / "nothing"))
    assert library.expected_bytes(library.make_settings(corpus="tinystories", corpus_megabytes=5000.0)) == library.TINYSTORIES_BYTES
    (tmp_path / "own.txt").write_text("x" * 12345)
    assert library.expected_bytes(library.make_settings(corpus=str(tmp_path / "own.txt"))) == 12345
    assert library.expected_bytes(library.make_settings()) <= library.LARGE_CORPUS          # the default says nothing


PEAK = """
import json, resource, sys
space = {"__name__": "run", "display": lambda *a, **k: None}
for source in json.load(open("cells.json")):
    exec(compile(source, "cell", "exec"), space)
status = open("/proc/self/status").read()
print("\\nPEAK", len(space["train_tokens"]))
"""


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux: it reads /proc")
def test_memory_does_not_grow_with_the_text(library, tmp_path):
    """Sections 2 to 4 on 2 and on 17 MB of stories, with samples taken from 1 MB on instead of 32: the pages that belong to no file."""
    most, tokens = [], []
    for stories in (3_000, 24_000):
        folder = tmp_path / str(stories)
        hub_folder(library, folder / "stories", stories)
        cells = []
        for source, tags in cells_of_sections(0, 4):
            if "parameters" in tags:
                source = 'preset = "gpu"\nchanges = dict(device="cpu", precision="float32", vocab_size=400, corpus_megabytes=100.0)'
            if "define" in tags or not any(word in source for word in ("tokenizers", "draw_tokens(", "five_gram_score(table)", "subplots", "input_and_target", "larger in (")):
                cells.append(source.replace("32_000_000", "1_000_000").replace("megabytes=8", "megabytes=1"))    # where samples begin to be taken
            if 'TINYSTORIES = "' in source:
                cells.append(f"TINYSTORIES = {str(folder / 'stories')!r}")
        (folder / "cells.json").write_text(json.dumps(cells))
        with subprocess.Popen([sys.executable, "-W", "ignore", "-c", PEAK], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            peak = 0
            while process.poll() is None:
                try:
                    match = re.search(r"RssAnon:\s+(\d+)", pathlib.Path(f"/proc/{process.pid}/status").read_text())
                except OSError:
                    match = None
                peak = max(peak, 1024 * int(match.group(1)) if match else 0)
                time.sleep(0.02)
            printed = process.stdout.read()
        assert process.returncode == 0, printed[-2000:]
        most.append(peak)
        tokens.append(int(re.search(r"PEAK (\d+)", printed).group(1)))
    assert tokens[1] > 6 * tokens[0]
    assert most[1] - most[0] < 0.15 * most[0], most           # eight times the text


# Devices

def test_a_device_that_computes_other_numbers_is_not_used(library, monkeypatch, capsys):
    config = library.GPTConfig(60, 32, 2, 2, 16)
    assert library.device_error(config, CPU) == 0.0
    assert library.trusted_device(config, torch.device("mps")) if torch.backends.mps.is_available() else True
    real, calls = library.GPT.to, []

    def slightly_wrong(model, device):
        calls.append(device)
        model = real(model, device)
        if len(calls) % 2 == 0:                        # the second model stands for the device
            model.blocks[1].attention.n_head = 1
        return model
    monkeypatch.setattr(library.GPT, "to", slightly_wrong)
    assert library.device_error(config, CPU) > 0.02
    monkeypatch.setattr(library, "device_error", lambda config, device: math.nan)
    assert library.trusted_device(config, torch.device("mps")) == CPU
    monkeypatch.setattr(library, "device_error", lambda config, device: 0.4)
    assert library.trusted_device(config, torch.device("mps")) == CPU
    def can_not(config, device):
        raise NotImplementedError("The operator 'aten::x' is not implemented\nand more")
    monkeypatch.setattr(library, "device_error", can_not)
    assert library.trusted_device(config, torch.device("mps")) == CPU
    said = capsys.readouterr().out.splitlines()
    assert [line.split("; ")[0] for line in said] == [
        f"the device mps is not used: {reason}" for reason in (
            "some of its results are no finite numbers", "its results differ from the CPU's by 40.0% of the largest number",
            "it can't run the model (The operator 'aten::x' is not implemented)")]
    monkeypatch.setattr(library, "device_error", lambda config, device: 0.001)
    assert library.trusted_device(config, torch.device("cuda")) == torch.device("cuda")


def test_one_gradient_that_is_no_number_is_enough(library, monkeypatch):
    """max() passes over a NaN that does not come first."""
    real, calls = library.GPT.to, []

    def nothing_for_the_last_norm(model, device):
        calls.append(device)
        if len(calls) % 2 == 0:
            model.final_norm.bias.register_hook(lambda gradient: gradient * math.nan)
        return real(model, device)
    monkeypatch.setattr(library.GPT, "to", nothing_for_the_last_norm)
    assert library.device_error(library.GPTConfig(60, 32, 2, 2, 16), CPU) == math.inf
    assert library.compare(lambda x: x * 1, lambda x: x, torch.ones(3)) == 0
    assert library.compare(lambda x: torch.where(x > 0, x, torch.sqrt(x - 2)), lambda x: x, torch.ones(3)) == math.inf      # right values, NaN in the gradient


def test_a_device_without_bfloat16_trains_in_float32(library, monkeypatch):
    def rate(dtype, device):
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported on MPS")
        return 100.0
    monkeypatch.setattr(library, "matmul_rate", rate)
    for precision in ("auto", "float32"):
        assert library.choose_precision(library.make_settings(precision=precision), torch.device("mps")) == (torch.float32, {torch.float32: 100.0, torch.bfloat16: 0.0})
    with pytest.raises(ValueError, match="precision is 'bfloat16', but the device mps does not know it: it may be 'auto' or 'float32'"):
        library.choose_precision(library.make_settings(precision="bfloat16"), torch.device("mps"))


def test_a_step_elsewhere_than_on_the_cpu_is_not_sliced(library, monkeypatch):
    """Each operation costs a GPU some microseconds however small it is, so their number may not grow with the batch. (The device "meta" has shapes alone.)"""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)        # which meta does not know

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            self.count += 1
            return operation(*arguments, **(options or {}))
    for activation in library.CHOICES["activation"]:
        counts = []
        for batch_size in (2, 64):
            settings = library.make_settings("gpu", n_layer=2, activation=activation)
            with torch.device("meta"):
                model, tokens = library.GPT(library.make_config(settings, settings.vocab_size)), torch.zeros((batch_size, settings.context_length), dtype=torch.int64)
            with Counter() as counter:
                model(tokens, tokens)[1].backward()
            counts.append(counter.count)
        assert counts[0] == counts[1] < 700, (activation, counts)


def test_tokens_sent_ahead_are_the_same_tokens(library):
    tokens = torch.arange(500, dtype=torch.int32) % 97
    sent = library.SentTokens(tokens, CPU)
    assert len(sent) == 500
    for starts in (None, torch.tensor([3, 50, 99])):
        pairs = [library.get_batch(source, 4, 16, CPU, torch.Generator().manual_seed(1), starts) for source in (tokens, sent)]
        assert all(torch.equal(a, b) for a, b in zip(*pairs))
    model = library.GPT(library.GPTConfig(97, 16, 1, 1, 16))
    assert library.for_training(model, tokens, library.make_settings()) == (model, tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_a_run_follows_the_cpus(library):
    settings = library.make_settings("smoke", max_steps=10, context_length=32)
    tokens = torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0))
    losses = []
    for device in (CPU, torch.device("cuda")):
        torch.manual_seed(0)
        model = library.GPT(library.make_config(settings, 200)).to(device)
        step_model, step_tokens = library.for_training(model, tokens, settings)
        losses.append(library.train(step_model, library.make_optimizers(model, settings), step_tokens, settings, library.new_history(), torch.Generator().manual_seed(0))["loss"])
    assert max(abs(a - b) for a, b in zip(*losses)) < 0.02


def can_compile():
    try:
        return float(torch.compile(lambda x: x.sin() + 1)(torch.zeros(3))[0]) == 1.0
    except Exception:
        return False


@pytest.fixture(scope="module")
def compiler(library):
    sys.modules["notebook_library"] = library           # torch.compile asks for the module of a function by its name
    if not can_compile():
        pytest.skip("needs a C++ compiler for torch.compile")
    yield
    del sys.modules["notebook_library"]


def test_a_compiled_run_follows_the_plain_one_and_shares_its_weights(library, compiler):
    tokens = torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0))
    losses = []
    for choice in ("no", "yes"):
        settings = library.make_settings("smoke", max_steps=12, context_length=32, n_layer=1, n_embd=32, compile=choice)
        torch.manual_seed(0)
        model = library.GPT(library.make_config(settings, 200))
        before = [p.clone() for p in model.parameters()]
        step_model, step_tokens = library.for_training(model, tokens, settings)
        assert (step_model is model) == (choice == "no")
        losses.append(library.train(step_model, library.make_optimizers(model, settings), step_tokens, settings, library.new_history(), torch.Generator().manual_seed(0))["loss"])
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert not any(name.startswith("_orig_mod") for name in model.state_dict())
    assert max(abs(a - b) for a, b in zip(*losses)) < 1e-3 and losses[0][-1] < losses[0][0]


def test_without_a_compiler_steps_are_plain_or_refused(library, monkeypatch, capsys):
    def no_compiler(function):
        raise RuntimeError("Cannot find a working triton installation\nand more")
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(library, "compiler_problem", library.compiler_problem.__wrapped__)          # without its memory
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"compile is 'yes', but torch.compile does not work for cpu here \(Cannot find a working triton installation\): it may be 'auto' or 'no'$"):
        library.for_training(model, TOKENS, library.make_settings(compile="yes"))
    monkeypatch.setattr(library, "compiler_problem", lambda device: "no Triton")
    on_cuda = types.SimpleNamespace(parameters=lambda: iter([types.SimpleNamespace(device=torch.device("cuda"))]))
    step_model, step_tokens = library.for_training(on_cuda, TOKENS, library.make_settings())
    assert step_model is on_cuda and isinstance(step_tokens, library.SentTokens)
    assert capsys.readouterr().out == "training steps are not compiled, because torch.compile does not work for cuda here (no Triton)\n"
    assert library.for_training(model, TOKENS, library.make_settings()) == (model, TOKENS)


def test_what_the_compiler_can_not_do_after_all_runs_as_it_is(monkeypatch, compiler):
    library = load_library([('settings.compile == "auto" and device.type == "cuda"', 'settings.compile == "auto"')])
    losses = {}
    for choice in ("no", "auto", "yes"):
        settings = library.make_settings("smoke", max_steps=3, context_length=32, n_layer=1, n_embd=32, compile=choice)
        torch.manual_seed(0)
        model = library.GPT(library.make_config(settings, 100))
        step_model, tokens = library.for_training(model, TOKENS, settings)
        monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda *arguments, **options: 1 / 0)
        torch._dynamo.reset()
        history = library.new_history()
        if choice == "yes":
            with pytest.raises(Exception, match="division by zero"):
                library.train(step_model, library.make_optimizers(model, settings), tokens, settings, history, torch.Generator().manual_seed(0))
        else:
            losses[choice] = library.train(step_model, library.make_optimizers(model, settings), tokens, settings, history, torch.Generator().manual_seed(0))["loss"]
        monkeypatch.undo()
    assert losses["auto"] == losses["no"] and len(losses["no"]) == 3
    torch._dynamo.reset()


def test_labs_do_not_compile_their_rehearsals(library, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(library, "dress_rehearsal", lambda settings, *arguments, **options: seen.append(settings.compile) or 1.0)
    settings = library.make_settings("smoke", compile="yes", context_length=16, n_embd=16, windows="anywhere", checkpoint_dir=str(tmp_path))
    _, history = library.experiment(settings, TOKENS, 0, 100, "stamp", CPU, torch.float32, lambda model: {})
    assert seen == ["no"] and len(history["loss"]) == 8


def test_a_compiled_model_is_blamed_by_its_own_names(library):
    model = library.GPT(library.GPTConfig(50, 8, 1, 1, 8))
    model.blocks[0].attention.projection.weight.data[0, 0] = math.nan
    assert library.likely_cause(torch.compile(model), [], library.make_settings(), torch.float32) == "the parameter blocks.0.attention.projection.weight is no longer finite"


def test_which_attention_the_compiler_recognises(library, compiler):
    """What section 14 says about it."""
    qkv = [torch.randn(2, 4, 64, 32) for _ in range(3)]
    triangle = torch.ones(64, 64, dtype=torch.bool).tril()
    added = torch.zeros(64, 64).masked_fill(~triangle, -math.inf)
    assert library.fused_attentions(lambda q, k, v: library.attention_weights(q, k, triangle) @ v, *qkv) == 0
    for _ in range(2):                                   # a second time, too: the compiler's cache must not hide it
        assert library.fused_attentions(lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(32) + added, -1) @ v, *qkv) == 1


# Fine-tuning

def test_fine_tuning_helps_and_leaves_the_model_alone(library):
    settings = library.make_settings("smoke", max_steps=40, context_length=16, n_embd=32, learning_rate=0.003)
    torch.manual_seed(0)
    model = library.GPT(library.make_config(settings, 50))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.arange(2000) % 7
    tuned, history = library.fine_tune(model, tokens, settings)
    assert len(history["loss"]) == 40 and history["loss"][-1] < 0.5 * history["loss"][0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert library.token_losses(tuned, tokens[:200]).mean() < 0.5 * library.token_losses(model, tokens[:200]).mean()


# Several processes

@pytest.fixture
def order(library, tmp_path):
    """A folder with the notebook, a token file and the means to write an order."""
    shutil.copy(NOTEBOOK, tmp_path / "gpt_from_scratch.ipynb")
    encoding = library.build_tokenizer([])
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef \n"), 60)) for _ in range(300)]
    library.write_tokens(tmp_path / "t.bin", texts, encoding, "stamp")

    def write(save_every=20, **changes):
        settings = library.make_settings("smoke", **{"batch_size": 4, "context_length": 32, "n_layer": 1, "n_embd": 32, "max_steps": 50, "precision": "float32", "device": "cpu", **changes})
        library.write_order(tmp_path / "together", settings, encoding.n_vocab, tmp_path / "t.bin", "stamp", save_every)
        return settings
    write.folder, write.tokens, write.vocab_size = tmp_path, torch.from_numpy(library.read_tokens(tmp_path / "t.bin", "stamp")[0]), encoding.n_vocab
    return write


def start_together(library, folder, processes=2):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    return subprocess.Popen(library.together_command("together", processes), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("changes", [{}, dict(optimizer="adamw", accumulation_steps=2, windows="anywhere"), dict(compile="yes")], ids=str)
def test_two_processes_follow_the_curve_of_one(library, order, changes, request):
    if changes.get("compile"):
        request.getfixturevalue("compiler")
    settings = order(**changes)
    starts = library.window_starts(order.tokens, order.vocab_size - 1, settings.context_length) if settings.windows == "documents" else None
    torch.manual_seed(settings.seed)
    model = library.GPT(library.make_config(settings, order.vocab_size))
    alone = library.train(model, library.make_optimizers(model, settings), order.tokens, settings, library.new_history(), torch.Generator().manual_seed(settings.seed), starts=starts)["loss"]
    process = start_together(library, order.folder)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    content = library.read_checkpoint(order.folder / "together" / "together.pt")
    assert content["step"] == 50 and len(alone) == 50
    assert max(abs(a - b) for a, b in zip(alone, content["history"]["loss"], strict=True)) < 2e-4
    assert max(float((p - content["model"][name]).abs().max()) for name, p in model.state_dict().items()) < 2e-3
    assert sorted(path.name for path in (order.folder / "together").iterdir()) == ["order.json", "together.previous.pt", "together.pt"]      # rank 0 alone wrote
    assert printed.count("saved") == 3


def test_each_process_reads_rows_of_its_own(library):
    tokens, world = torch.arange(1000), 4
    whole = library.get_batch(tokens, 8, 5, generator=torch.Generator().manual_seed(0))
    shares = [library.share_of_batch(library.get_batch, rank, world)(tokens, 8, 5, generator=torch.Generator().manual_seed(0)) for rank in range(world)]
    firsts = [set(inputs[:, 0].tolist()) for inputs, _ in shares]
    assert all(len(inputs) == 2 and torch.equal(targets, inputs + 1) for inputs, targets in shares)
    assert not any(a & b for i, a in enumerate(firsts) for b in firsts[i + 1:])
    assert set().union(*firsts) == set(whole[0][:, 0].tolist())


def test_a_killed_process_ends_the_run_with_a_sentence_and_the_same_command_goes_on(library, order):
    order(max_steps=100_000, save_every=5)
    process, lines, pids = start_together(library, order.folder), [], {}
    for line in process.stdout:
        lines.append(line)
        if match := re.search(r"process (\d) of 2 on cpu \(pid (\d+)\)", line):
            pids[int(match.group(1))] = int(match.group(2))
        if "step 10:" in line:
            os.kill(pids[1], signal.SIGKILL)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"process 0 ends, because another process of the run has ended; \S*together.pt is the last checkpoint, and the same command goes on from there", rest), rest[-3000:]
    kept = library.read_checkpoint(order.folder / "together" / "together.pt")
    assert kept["step"] >= 10 and kept["step"] % 5 == 0
    order(max_steps=kept["step"] + 10, save_every=5)
    process = start_together(library, order.folder)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"begins with step {kept['step']}" in printed, printed[-3000:]
    history = library.read_checkpoint(order.folder / "together" / "together.pt")["history"]["loss"]
    assert len(history) == kept["step"] + 10 and history[:kept["step"]] == kept["history"]["loss"]


def test_a_batch_that_can_not_be_shared_is_refused(library, order, monkeypatch):
    order(batch_size=3)
    monkeypatch.chdir(order.folder)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="batch_size is 3, but it must be a multiple of the number of processes, which is 2"):
        library.train_together("together")


def test_more_processes_than_gpus_are_refused(library, order, monkeypatch):
    order()
    monkeypatch.chdir(order.folder)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match=r"--nproc-per-node is 2, but this machine has 1 GPU\(s\), and each process needs one of its own; to train on CPUs, set CUDA_VISIBLE_DEVICES"):
        library.train_together("together")


def test_the_documented_command_is_one_line_that_needs_no_file(library):
    command = shlex.join(library.together_command("checkpoints/together", 8))
    assert command.startswith("torchrun --standalone --nproc-per-node=8 --no-python python") and "\n" not in command
    assert ".py" not in command and shlex.split(command)[-1].endswith('train_together("checkpoints/together")')
    documented = re.search(r"^torchrun .*$", (NOTEBOOK.parent / "README.md").read_text(encoding="utf-8"), re.M).group(0)
    assert shlex.split(documented)[5:] == library.together_command("checkpoints/together")[5:]


# What it would take

def test_large_models_have_their_published_sizes(library):
    millions = {name: round(library.parameter_formula(config) / 1e6) for name, config in library.BIG_MODELS.items()}
    assert millions == {"GPT-2 small": 124, "GPT-2 medium": 355, "GPT-2 large": 774, "GPT-2 XL": 1558, "a 7B model": millions["a 7B model"]}
    assert 6500 < millions["a 7B model"] < 7500


@pytest.mark.parametrize("changes", [{}, dict(position="rotary"), dict(qk_norm=True), dict(norm="rmsnorm", bias=False, activation="relu_squared"),
                                     dict(position="rotary", qk_norm=True, tie_embeddings=False)], ids=str)
def test_kept_numbers_are_what_is_kept(library, changes):
    for shape in ((500, 96, 2, 4, 64), (900, 64, 3, 2, 96), (300, 128, 1, 8, 64)):
        config = library.GPTConfig(*shape, **changes)
        assert abs(8 * config.context_length * library.kept_numbers(config) / library.kept_bytes(config, 2) - 1) < 0.02
    saved = library.kept_numbers(config) - library.kept_numbers(config, fused=True)
    assert saved == config.n_layer * config.n_head * config.context_length


def test_what_it_takes_by_hand(library):
    need = library.what_it_takes(library.GPTConfig(), rate=1e12)
    parameters = 124_439_808
    matrices = 12 * 12 * 768**2 + 50257 * 768
    flops = 20 * parameters * (6 * matrices + 12 * 12 * 1024 * 768)
    assert need["parameters"] == parameters and need["tokens"] == 20 * parameters and need["flops"] == flops
    assert math.isclose(need["hours"], flops / 1e12 / 3600) and math.isclose(need["state_gigabytes"], 16 * parameters / 1e9)
    unfused, fused = need["activation_gigabytes"]
    assert math.isclose(unfused - fused, 2 * 1024 * 12 * 12 * 1024 / 1e9)


def test_the_progress_line_shows_the_utilisation(library, monkeypatch):
    lines = []

    class Line:
        def update(self, data, raw=False):
            lines.append(data)
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: Line())
    settings = library.make_settings("smoke", max_steps=4)
    per_step = settings.batch_size * settings.accumulation_steps * settings.context_length
    progress = library.Progress(settings, 3.0, full_speed=4 * per_step)
    progress({"loss": [3.0, 2.0], "seconds": 1.0, "evaluations": []})           # two steps a second, of four at full speed
    assert "utilisation 50%" in lines[-1]["text/plain"]
    progress = library.Progress(settings, 3.0, full_speed=4 * per_step, every=0)
    progress({"loss": [3.0], "seconds": 60.0, "evaluations": []})               # a first step that holds the compiler's work does not count
    progress({"loss": [3.0, 2.0, 2.0], "seconds": 61.0, "evaluations": []})
    assert "utilisation 50%" in lines[-1]["text/plain"] and " 0 s left" in lines[-1]["text/plain"]

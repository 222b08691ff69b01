"""The notebook on an accelerator written in Python (pretend.py): every tensor is where it must be.

The device stays for the life of a process, so each test has one of its own."""
import multiprocessing, os, pathlib, types

import pytest
import torch

import referees
from conftest import load_library, run_cells

WITH_PRETEND = [
    ('Literal["auto", "cpu", "cuda", "mps"]', 'Literal["auto", "cpu", "cuda", "mps", "pretend"]'),
    ('found = {"cuda":', 'found = {"pretend": True, "cuda":'),
    ('if device.type == "cuda":\n        torch.set_float32_matmul_precision',
     'if device.type != "cpu":\n        torch.set_float32_matmul_precision'),
    ('8192 if device.type == "cuda" else 1024', "64")]                # here no speed is measured
PARTS = [{}, dict(position="sinusoidal"),  # (dropout would draw other numbers there)
         dict(optimizer="adamw", position="learned", norm="layernorm", activation="gelu",
              bias=True, tie_embeddings=True)]


def in_a_new_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def train_there(changes):
    """[losses on the CPU, on pretend in float32, there in bfloat16]; scores and texts of the first
    two."""
    import pretend
    library = load_library(WITH_PRETEND)
    tokens = torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0))
    losses, models = [], []
    for device, precision in (("cpu", torch.float32), ("pretend", torch.float32),
                              ("pretend", torch.bfloat16)):
        run = referees.small_run(library, 200, device, precision, context_length=32, **changes)
        models.append(run.model)
        losses.append(library.train(run, tokens, show=False)["loss"])
    scores = [library.per_token_losses(model, tokens[:200]).tolist() for model in models[:2]]
    written = [list(map(int, library.stream_tokens(model, tokens[None, :5], 20, top_k=20, seed=3)))
               for model in models[:2]]
    assert pretend.operations > 1000 and next(models[1].parameters()).device.type == "pretend"
    return losses, scores, written


@pytest.mark.long
@pytest.mark.parametrize("parts", PARTS, ids=["today's parts", "fixed waves", "GPT-2's parts"])
def test_training_scoring_and_writing_on_another_device(parts):
    (here, there, halved), scores, written = in_a_new_process(train_there, parts)
    # the same arithmetic; only where the output is tied, two gradients are added in another order
    assert here == there or "tie_embeddings" in parts
    assert max(abs(a - b) for a, b in zip(here, there)) < 0.02 and here[-1] < here[0]
    assert (scores[0], written[0]) == (scores[1], written[1]) or here != there
    one, other = torch.tensor(scores).mean(1)
    assert abs(one - other) < 0.05
    assert here != halved and max(abs(a - b) for a, b in zip(here, halved)) < 0.01


def carried_over(folder):
    """A run is stopped on one device, saved, and goes on there and on the CPU: the losses of the
    three runs."""
    import pretend  # noqa: F401
    library, ends, path = load_library(WITH_PRETEND), [], pathlib.Path(folder, "run.pt")
    tokens = torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0))
    for device in ("pretend", "pretend", "cpu"):
        run = referees.small_run(library, 200, device, max_steps=10, context_length=32)
        if not path.exists():
            for name, value in zip(("loss", "norm", "rate"), library.training_step(run, tokens)):
                run.history[name].append(value)
            library.save_checkpoint(path, run, [], "s")
        else:
            library.load_checkpoint(path, run, "s")
        ends.append(library.train(run, tokens, show=False)["loss"])
    return ends


def test_a_checkpoint_goes_from_one_device_to_another(tmp_path):
    first, second, third = in_a_new_process(carried_over, str(tmp_path))
    assert first == second == third and len(first) == 10


def every_section(folder, precision):
    import IPython.display
    import pretend
    IPython.display.display = lambda *a, **k: types.SimpleNamespace(update=lambda *a, **k: None)
    os.chdir(folder)
    settings = (f'preset = "smoke"\nchanges = dict(device="pretend", precision="{precision}", '
                'corpus_megabytes=0.4, max_steps=15, n_layer=1, n_embd=32, context_length=32, '
                'dropout=0.1, evaluations=1, samples=4, sample_tokens=24)')
    quick = ("check", "exercise")
    space = run_cells(0, 8, settings, WITH_PRETEND, quick)
    run_cells(9, 12, "", WITH_PRETEND, space=space)
    run_cells(13, 13, "", WITH_PRETEND, (*quick, "run"), space=space)  # the definitions alone
    run_cells(14, 14, "", WITH_PRETEND, quick, "together_command(", space)  # that is for the CPU
    assert space["device"].type == next(space["model"].parameters()).device.type == "pretend"
    assert space["precision"] == getattr(torch, precision)
    assert torch.get_float32_matmul_precision() == "high" and pretend.operations > 20_000


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_every_section_runs_on_another_device(tmp_path, monkeypatch, precision):
    """With TF32's rounding of the factors in both, since sections 10 to 12 compute in float32 in
    any case."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    in_a_new_process(every_section, str(tmp_path), precision)

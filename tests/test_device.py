"""The notebook on a device that is not the CPU: an accelerator written in Python (pretend.py), for want of a real one in CI.

It shows that every tensor is where it must be, and that bfloat16 works as CUDA's autocast has it; not how fast anything is.
The device stays for the life of a process, so each test has one of its own.
"""
import concurrent.futures
import multiprocessing
import os
import types

import pytest
import torch

from conftest import NOTEBOOK, cells_of_sections, load_library

WITH_PRETEND = [('"device": ("auto", "cpu", "cuda", "mps")', '"device": ("auto", "cpu", "cuda", "mps", "pretend")'),
                ('available = {"cpu": True', 'available = {"pretend": True, "cpu": True'),
                ('if device.type == "cuda":\n        torch.set_float32_matmul_precision', 'if device.type != "cpu":\n        torch.set_float32_matmul_precision')]
PARTS = {"today's parts": {}, "GPT-2's parts": dict(optimizer="adamw", position="learned", norm="layernorm", activation="gelu", bias=True, tie_embeddings=True),
         "the rest": dict(dropout=0.1, accumulation_steps=2, position="sinusoidal", qk_norm=True)}


def in_a_new_process(function, *arguments):
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def what_is_refused():
    """{attempt: what was said of it, None where it passed}, and whether what a GPU allows is allowed and casts as autocast does."""
    import pretend
    there, here = torch.ones(4, 4, device="pretend"), torch.ones(4, 4)
    tries = {"sum": lambda: there + here, "product": lambda: here @ there, "in place": lambda: here.add_(there), "joined": lambda: torch.cat([there, here]),
             "lookup": lambda: torch.nn.functional.embedding(torch.tensor([1]), there), "indexed from there": lambda: here[torch.tensor([1], device="pretend")],
             "float64": lambda: there.double(), "generator": lambda: torch.rand(3, device="pretend", generator=torch.Generator())}
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = None
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)
    allowed = torch.equal((2 * there[torch.tensor([0, 1])] * torch.tensor(0.5)).cpu(), here[:2]) and pretend.operations > 3
    with torch.autocast("pretend", torch.bfloat16):
        product = there @ there
        cast = [x.dtype for x in (product, product.sum(), product.rsqrt(), product + product)]
    return said, allowed and cast == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]


def test_the_pretend_device_refuses_what_a_gpu_refuses():
    said, allowed = in_a_new_process(what_is_refused)
    for name, words in said.items():
        reason = {"float64": "in float64", "generator": "with a generator of the CPU"}.get(name, "on tensors of pretend and of the CPU")
        assert words and reason in words, (name, words)
    assert allowed


def train_there(changes, replace=()):
    """[losses on the CPU, on pretend in float32, there in bfloat16], and the largest difference of scores and texts between the devices."""
    import pretend
    library = load_library([*WITH_PRETEND, *replace])
    settings = library.make_settings("smoke", max_steps=12, context_length=32, **changes)
    tokens = torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0))
    losses, models = [], []
    for device, precision in (("cpu", torch.float32), ("pretend", torch.float32), ("pretend", torch.bfloat16)):
        torch.manual_seed(0)
        model = library.GPT(library.make_config(settings, 200)).to(device)
        step_model, step_tokens = library.for_training(model, tokens, settings)
        losses.append(library.train(step_model, library.make_optimizers(model, settings, precision), step_tokens, settings, library.new_history(),
                                    torch.Generator().manual_seed(0), precision)["loss"])
        models.append(model.eval())
    scores = [library.token_losses(model, tokens[:200]) for model in models[:2]]
    written = [[int(token) for token in library.itertools.islice(library.stream_tokens(model, tokens[None, :5], 20, top_k=20, seed=3), 20)] for model in models[:2]]
    assert pretend.operations > 1000 and next(models[1].parameters()).device.type == "pretend"
    return losses, float((scores[0] - scores[1].cpu()).abs().max()), written[0] == written[1]


@pytest.mark.parametrize("parts", PARTS)
def test_training_scoring_and_writing_on_another_device(parts):
    (here, there, halved), difference, same_text = in_a_new_process(train_there, PARTS[parts])
    assert here == there and here[-1] < here[0]                  # the same arithmetic, so the same numbers
    assert difference == 0 and same_text
    assert here != halved and max(abs(a - b) for a, b in zip(here, halved)) < 0.01


@pytest.mark.parametrize("old, new", [("torch.arange(past, past + T, device=tokens.device)", "torch.arange(past, past + T)"),
                                      ("for s in group]).to(device)", "for s in group])")])
def test_a_tensor_on_the_wrong_side_would_be_noticed(old, new):
    with pytest.raises(RuntimeError, match="on tensors of pretend and of the CPU"):
        in_a_new_process(train_there, dict(position="learned"), [(old, new)])


def carried_over(folder):
    """A run is stopped on one device, saved, and goes on there and on the CPU. → whether all three runs end alike."""
    import pretend  # noqa: F401  (makes the device)
    library, ends = load_library(WITH_PRETEND), []
    tokens = torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0))
    settings = library.make_settings("smoke", max_steps=10, context_length=32)

    def fresh(device):
        torch.manual_seed(0)
        model = library.GPT(library.make_config(settings, 200)).to(device)
        return model, library.make_optimizers(model, settings), torch.Generator().manual_seed(0)

    path = library.pathlib.Path(folder, "run.pt")
    for device in ("pretend", "pretend", "cpu"):
        model, optimizers, generator = fresh(device)
        history = library.load_checkpoint(path, model, optimizers, generator, stamp="s")["history"] if path.exists() else library.new_history()

        def report(history):
            if len(history["loss"]) == 4 and not path.exists():
                library.save_checkpoint(path, model, optimizers, 4, history, settings, [], generator, "s")
        ends.append(library.train(model, optimizers, tokens, settings, history, generator, report=report)["loss"])
    return ends[0] == ends[1] == ends[2], len(ends[0])


def test_a_checkpoint_goes_from_one_device_to_another(tmp_path):
    assert in_a_new_process(carried_over, str(tmp_path)) == (True, 10)


def every_section(folder, precision):
    import IPython.display
    import pretend
    IPython.display.display = lambda *a, **k: types.SimpleNamespace(update=lambda *a, **k: None)
    os.chdir(folder)
    space = {"__name__": "run", "display": lambda *a, **k: None}
    labs = [(source, tags) for source, tags in cells_of_sections(13, 13) if "define" in tags]
    cells = cells_of_sections(0, 12, without={"exercise"}) + labs + cells_of_sections(14, 14)
    for source, tags in cells:
        if "parameters" in tags:
            source = 'preset = "smoke"\nchanges = dict(device="pretend", precision="' + precision + '")'
        for old, new in WITH_PRETEND:
            source = source.replace(old, new)
        exec(compile(source, "cell", "exec"), space)
    return space["device"].type, str(space["precision"]), next(space["model"].parameters()).device.type, torch.get_float32_matmul_precision(), pretend.operations


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_every_section_runs_on_another_device(tmp_path, monkeypatch, precision):
    """With TF32's rounding of the factors in both, since sections 10 to 12 compute in float32 in any case."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    device, used, place, products, operations = in_a_new_process(every_section, str(tmp_path), precision)
    assert device == place == "pretend" and used == f"torch.{precision}" and products == "high" and operations > 50_000


def cache_check(old, new):
    """Section 11's check of the cache, as it stands or changed, on the model that ships, where TF32 rounds the factors."""
    import pretend  # noqa: F401  (makes the device)
    space, device = vars(load_library()), torch.device("pretend")
    settings = space["make_settings"]("pretrained", checkpoint_dir=str(NOTEBOOK.parent / "checkpoints"))
    merges, tokenizer = space["make_tokenizer"](settings, [])
    config = space["make_config"](settings, tokenizer.n_vocab)
    shipped = space["GPT"](config)
    space["load_pretrained"](settings, shipped, merges)
    model = space["GPT"](config).to(device).eval()
    for p, weight in zip(model.parameters(), shipped.parameters()):
        p.data.copy_(weight.data)
    text = "def find(self, name):\n    for item in self.items:\n        if item.name == name:\n            return item\n    return None\n" * 12
    space.update(model=model, tokenizer=tokenizer, config=config, device=device, demo_prompt="def is_prime(n):",
                 validation_tokens=torch.tensor([tokenizer.eot_token] + tokenizer.encode_ordinary(text)))
    source, = (source for source, tags in cells_of_sections(11, 11, without=()) if "check" in tags and "KeyValueCache" in source)
    assert source.count(old) == 1
    torch.set_float32_matmul_precision("high")
    exec(source.replace(old, new), space)
    return space["difference"], torch.get_float32_matmul_precision()


def test_the_cache_is_checked_without_rounded_factors():
    """With them its two ways differ by more than the check allows: it would stop the notebook on every card with TF32."""
    difference, products = in_a_new_process(cache_check, "exact_products()", "exact_products()")
    assert difference < 1e-5 and products == "high"
    with pytest.raises(AssertionError):
        in_a_new_process(cache_check, "exact_products()", "contextlib.nullcontext()")


def kinds_of_attention_weights():
    """The dtype of attention weights under autocast as CUDA has it: as the notebook writes softmax, and without its dtype."""
    import pretend  # noqa: F401  (makes the device)
    found = []
    for replace in ([], [("torch.softmax(scores, -1, dtype=scores.dtype)", "torch.softmax(scores, -1)")]):
        library = load_library(replace)
        q, k = (torch.randn(2, 5, 8).to("pretend") for _ in range(2))
        with torch.autocast("pretend", torch.bfloat16):
            found.append(library.attention_weights(q, k).dtype)
    return found


def test_attention_weights_stay_in_half_precision():
    """They are the largest thing that a step keeps; CUDA's autocast would raise them to float32."""
    assert in_a_new_process(kinds_of_attention_weights) == [torch.bfloat16, torch.float32]

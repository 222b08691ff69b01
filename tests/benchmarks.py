"""Timings: how fast the notebook's own `define` cells are, alone and against other people's code. No part of the test suite.

    python tests/benchmarks.py --rows 5,6,7 --json

Rows: 1 to 4 train models (minutes to hours), 5 to 10 take seconds to minutes, `memory` runs sections 2 to 4 on large texts,
`compile` takes training steps with and without torch.compile, and `gpu` does so on a CUDA card, against nanoGPT at two of its own settings.
A peer is compared with where its path is given (--nanogpt, --minbpe: checkouts of the public repositories) or where it is
installed (transformers, tokenizers). Rows 1 to 3 need Tiny Shakespeare as a file (--shakespeare). Each measurement that is
compared runs in a process of its own, the two sides in turn.
"""
import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import torch

from conftest import NOTEBOOK, load_library

MODERN = dict(n_layer=4, vocab_size=257, windows="anywhere", accumulation_steps=1)        # 256 bytes and the end of text: characters
SHAKESPEARE = {  # settings of rows 1 to 3, on the laptop preset; max_steps is what fits into the time
    1: dict(MODERN, n_embd=128, n_head=2, context_length=256, batch_size=8),
    2: dict(MODERN, n_embd=128, n_head=2, context_length=64, batch_size=16),
    3: dict(MODERN, n_embd=256, n_head=4, context_length=256, batch_size=8),
}
LIKE_NANOGPT = dict(activation="gelu", warmup_steps=100)       # where nanoGPT differs from the notebook's CLASSIC
NANOGPT_CPU = ("--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
               "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()       # its README's command for a CPU


# Processes of their own

def in_process(task, **arguments):
    """Runs the function of that name in a new Python process; returns its result (plain values)."""
    program = f"import sys, json; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); import benchmarks; " \
              f"print(chr(30) + json.dumps(benchmarks.{task}(**json.loads(sys.argv[1]))))"
    environment = {**os.environ, "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program, json.dumps(arguments)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout[done.stdout.rindex(chr(30)) + 1:])          # a sign that JSON writes out otherwise


def prepared_library():
    library = load_library()
    library.keep_freed_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return library


def best_precision(library, settings):
    """The precision that section 1 of the notebook would choose, and the measured rates."""
    rates = {dtype: library.matmul_rate(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)}
    if settings.precision != "auto":
        return getattr(torch, settings.precision), rates
    return (torch.bfloat16 if rates[torch.bfloat16] > 1.3 * rates[torch.float32] else torch.float32), rates


def train_for(library, seconds, settings, tokens, precision, starts=None):
    """Trains a new model for about so many seconds: the steps that fit, by ten steps on a throw-away copy. → model, seconds, steps."""
    config = library.make_config(settings, settings.vocab_size)
    step_seconds = library.dress_rehearsal(settings, config, tokens, torch.device("cpu"), precision, steps=40)
    settings = dataclasses.replace(settings, max_steps=max(1, int(0.92 * seconds / step_seconds)))      # 8% in reserve for slower moments
    torch.manual_seed(settings.seed)
    model = library.GPT(config)
    optimizers, generator = library.make_optimizers(model, settings, precision), torch.Generator().manual_seed(settings.seed)
    history = library.train(model, optimizers, tokens, settings, library.new_history(), generator, precision, starts=starts)
    return model, history["seconds"], settings.max_steps


# Rows 1 to 3: Tiny Shakespeare

def shakespeare_tokens(path):
    """The first nine tenths and the last tenth of the text, one token per byte."""
    tokens = torch.tensor(list(pathlib.Path(path).read_bytes()))
    cut = int(0.9 * len(tokens))
    return tokens[:cut], tokens[cut:]


def whole_losses(library, model, tokens, precision):
    """Nats per character over the whole text: in windows side by side, and with half a window before each character."""
    length = model.config.context_length
    return {"side_by_side": float(library.token_losses(model, tokens, precision, stride=length).mean()),
            "half_overlap": float(library.token_losses(model, tokens, precision).mean())}


def our_shakespeare(path, row, seconds, seed, precision):
    library = prepared_library()
    training, validation = shakespeare_tokens(path)
    settings = library.make_settings("laptop", seed=seed, precision=precision, **SHAKESPEARE[row])
    precision, _ = best_precision(library, settings)
    model, taken, steps = train_for(library, seconds, settings, training, precision)
    return {"seconds": taken, "steps": steps, "precision": str(precision)[6:], **whole_losses(library, model, validation, precision)}


def nanogpt_shakespeare(path, nanogpt, seed):
    """nanoGPT's CPU recipe as published, but for the seed. Seconds from its first measurement to its end."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "nanoGPT")
        shutil.copytree(nanogpt, copy, ignore=shutil.ignore_patterns(".git"))
        shutil.copyfile(path, copy / "data/shakespeare_char/input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=copy / "data/shakespeare_char", check=True, capture_output=True)
        source = (copy / "train.py").read_text()
        assert source.count("manual_seed(1337 ") == 1
        (copy / "train.py").write_text(source.replace("manual_seed(1337 ", f"manual_seed({seed} "))
        command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *NANOGPT_CPU]
        start = None
        with subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                if start is None and line.startswith("using fused"):
                    start = time.perf_counter()
        seconds = time.perf_counter() - start
        assert process.returncode == 0
        sys.path.insert(0, str(copy))
        import model as peer
        checkpoint = torch.load(copy / "out-shakespeare-char/ckpt.pt", weights_only=False)
        network = peer.GPT(peer.GPTConfig(**checkpoint["model_args"]))
        network.load_state_dict(checkpoint["model"])
    characters = sorted(set(pathlib.Path(path).read_text()))
    lookup = torch.zeros(256, dtype=torch.int64)
    lookup[[ord(character) for character in characters]] = torch.arange(len(characters))
    library, (_, validation) = load_library(), shakespeare_tokens(path)

    class Adapter(torch.nn.Module):             # so that the same function scores both
        config = library.GPTConfig(vocab_size=len(characters), context_length=64, n_layer=4, n_head=4, n_embd=128)
        def __init__(self):
            super().__init__()
            self.network = network
        def forward(self, tokens, targets=None):
            tokens = tokens.contiguous()
            return self.network(tokens, tokens)[0], None
    return {"seconds": seconds, **whole_losses(library, Adapter().eval(), lookup[validation], torch.float32)}


def spread(values):
    return [round(min(values), 4), round(max(values), 4)]


def row_1_to_3(options, rows):
    if not options.shakespeare:
        raise SystemExit("rows 1 to 3 need --shakespeare, the path of Tiny Shakespeare's text")
    seeds = range(1, options.seeds + 1)
    ours, theirs, shares = [], [], []
    if {1, 2} & set(rows):
        for seed in seeds:
            peer = in_process("nanogpt_shakespeare", path=options.shakespeare, nanogpt=options.nanogpt, seed=seed) if options.nanogpt else None
            budget = peer["seconds"] if peer else options.seconds
            theirs.append(peer)
            if 1 in rows:
                ours.append(in_process("our_shakespeare", path=options.shakespeare, row=1, seconds=budget, seed=seed, precision=options.precision))
            if 2 in rows and peer:
                for share in (1 / 16, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 2, 1):
                    trial = in_process("our_shakespeare", path=options.shakespeare, row=2, seconds=budget * share, seed=seed,
                                       precision=options.precision)
                    if trial["side_by_side"] <= peer["side_by_side"]:
                        shares.append(trial["seconds"] / peer["seconds"])
                        break
        peers = [t for t in theirs if t]
        peer_loss = statistics.median(t["side_by_side"] for t in peers) if peers else None
        if 1 in rows:
            values = [run["side_by_side"] for run in ours]
            yield dict(row=1, what="Tiny Shakespeare in the time of nanoGPT's CPU recipe, whole validation set", unit="nats per character",
                       value=statistics.median(values), peer=peer_loss, spread=spread(values), seconds=[round(run["seconds"], 1) for run in ours],
                       peer_seconds=[round(t["seconds"], 1) for t in peers], steps=[run["steps"] for run in ours], precision=ours[0]["precision"],
                       half_overlap=statistics.median(run["half_overlap"] for run in ours),
                       peer_half_overlap=statistics.median(t["half_overlap"] for t in peers) if peers else None)
        if 2 in rows and shares:
            yield dict(row=2, what="time to nanoGPT's final loss, as a share of its time", unit="share", value=statistics.median(shares),
                       peer=1.0, ratio=statistics.median(shares), spread=spread(shares), precision=trial["precision"])
    if 3 in rows:
        runs = [in_process("our_shakespeare", path=options.shakespeare, row=3, seconds=options.minutes * 60, seed=seed, precision=options.precision)
                for seed in seeds]
        values = [run["side_by_side"] for run in runs]
        yield dict(row=3, what=f"Tiny Shakespeare in {options.minutes:g} minutes, whole validation set", unit="nats per character",
                   value=statistics.median(values), peer=1.4697, spread=spread(values), steps=[run["steps"] for run in runs], precision=runs[0]["precision"],
                   half_overlap=statistics.median(run["half_overlap"] for run in runs), seconds=[round(run["seconds"], 1) for run in runs])


# Row 4: the laptop preset against nanoGPT's recipe in the same settings

def code_cells(stop, changes):
    """Sources of the code cells before the markdown cell that begins with `stop`, with the parameters cell replaced."""
    sources = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and source.startswith(stop):
            return sources
        if cell["cell_type"] == "code":
            if "parameters" in cell["metadata"].get("tags", []):
                source = f'preset = "laptop"\nchanges = {changes!r}'
            sources.append(source)
    raise AssertionError(f"no markdown cell begins with {stop!r}")


def execute_cells(sources):
    import builtins
    from matplotlib import pyplot
    builtins.display = lambda *things: None
    space = {"__name__": "benchmark"}
    for source in sources:
        exec(compile(source, "cell", "exec"), space)
        pyplot.close("all")
    return space


def python_run(folder, seed, changes, seconds=None, precision="auto"):
    """Trains on the python corpus: the laptop preset whole, or for so many seconds. Bits per byte of the whole validation set."""
    os.chdir(folder)
    import contextlib
    with contextlib.redirect_stdout(None):
        space = execute_cells(code_cells("## 5 ", {}))
    library = prepared_library()
    settings = library.make_settings("laptop", **{"seed": seed, "precision": precision, **changes})
    precision, _ = best_precision(library, settings)
    starts = library.window_starts(space["train_tokens"], space["tokenizer"].eot_token, settings.context_length) if settings.windows == "documents" else None
    if seconds is None:
        config = library.make_config(settings, settings.vocab_size)
        seconds = settings.max_steps * library.dress_rehearsal(settings, config, space["train_tokens"], torch.device("cpu"), precision)
    model, taken, steps = train_for(library, seconds, settings, space["train_tokens"], precision, starts)
    scores = library.evaluate(model, space["validation_tokens"], space["text_bytes"]["validation"], precision)
    return {"seconds": taken, "steps": steps, "bits_per_byte": scores["bits_per_byte"], "precision": str(precision)[6:]}


def row_4(options):
    with tempfile.TemporaryDirectory() as folder:
        ours, classic = [], []
        for seed in range(1, options.seeds + 1):
            ours.append(in_process("python_run", folder=folder, seed=seed, changes={}, precision=options.precision))
            classic.append(in_process("python_run", folder=folder, seed=seed, changes={**load_library().CLASSIC, **LIKE_NANOGPT}, seconds=ours[-1]["seconds"]))
    values, peers = ([run["bits_per_byte"] for run in runs] for runs in (ours, classic))
    yield dict(row=4, what="python corpus, laptop preset, against GPT-2's parts with AdamW in float32 at equal time", unit="bits per byte",
               value=statistics.median(values), peer=statistics.median(peers), ratio=statistics.median(values) / statistics.median(peers),
               spread=spread(values), peer_spread=spread(peers), seconds=[round(run["seconds"]) for run in ours],
               peer_seconds=[round(run["seconds"]) for run in classic], steps=[run["steps"] for run in ours],
               peer_steps=[run["steps"] for run in classic], precision=ours[0]["precision"])


# Rows 5 and 6: a training step

STEP_SHAPES = {  # width, heads, layers, context, batch, vocabulary
    "nanoGPT's CPU recipe": (128, 4, 4, 64, 12, 65),
    "laptop preset": (192, 3, 4, 256, 8, 2048),
    "width 256": (256, 4, 4, 256, 8, 2048),
}
GPU_SHAPES = {  # the same and dropout: the settings of nanoGPT's config files for its GPT-2 and for Tiny Shakespeare
    "GPT-2 124M": (768, 12, 12, 1024, 12, 50304, 0.0),
    "nanoGPT's Shakespeare 10.65M": (384, 6, 6, 256, 64, 65, 0.2),
}


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def most_bytes(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def our_step(shape, steps=25, device="cpu", precision="float32", compile="no", classic=True):
    """Median seconds of a step, and the most bytes in use on CUDA; GPT-2's parts (but exact GELU, as nanoGPT's) with AdamW, or the preset's."""
    width, heads, layers, context, batch, vocabulary, *dropout = (STEP_SHAPES | GPU_SHAPES)[shape]
    library = prepared_library()
    parts = {**library.CLASSIC, **LIKE_NANOGPT} if classic else {}
    settings = library.make_settings("laptop", **{**parts, "n_embd": width, "n_head": heads, "n_layer": layers, "context_length": context,
                                                  "batch_size": batch, "accumulation_steps": 1, "compile": compile, "dropout": (*dropout, 0.0)[0]})
    precision = getattr(torch, precision)
    model = library.GPT(dataclasses.replace(library.make_config(settings, 257), vocab_size=vocabulary)).to(device)
    optimizers, generator = library.make_optimizers(model, settings, precision), torch.Generator().manual_seed(0)
    model, tokens = library.for_training(model, torch.randint(vocabulary, (100_000,)), settings)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        library.training_step(model, optimizers, tokens, settings, step, generator, precision)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return dict(seconds=statistics.median(times[3:]), bytes=most_bytes(device))


def nanogpt_step(shape, nanogpt, steps=25, device="cpu", precision="float32", compile="no"):
    """The same with nanoGPT's model and optimiser, in the order of its train.py."""
    sys.path.insert(0, nanogpt)
    import model as peer
    width, heads, layers, context, batch, vocabulary, *dropout = (STEP_SHAPES | GPU_SHAPES)[shape]
    network = peer.GPT(peer.GPTConfig(block_size=context, vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width,
                                      dropout=(*dropout, 0.0)[0], bias=True)).to(device)
    optimizer = network.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
    network = torch.compile(network) if compile == "yes" else network
    halved = contextlib.nullcontext() if precision == "float32" else torch.autocast(device, getattr(torch, precision))
    tokens, times = torch.randint(vocabulary, (100_000,)), []
    for step in range(steps):
        start = time.perf_counter()
        first = torch.randint(len(tokens) - context, (batch,))
        inputs, targets = (torch.stack([tokens[i + d:i + d + context] for i in first]) for d in (0, 1))
        if device == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with halved:
            loss = network(inputs, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return dict(seconds=statistics.median(times[3:]), bytes=most_bytes(device))


def row_5(options):
    for shape, (width, heads, layers, context, batch, vocabulary) in STEP_SHAPES.items():
        ours, theirs = [], []
        for _ in range(options.seeds):
            ours.append(batch * context / in_process("our_step", shape=shape)["seconds"])
            if options.nanogpt:
                theirs.append(batch * context / in_process("nanogpt_step", shape=shape, nanogpt=options.nanogpt)["seconds"])
        value, peer = statistics.median(ours), statistics.median(theirs) if theirs else None
        yield dict(row=5, what=f"training step, GPT-2's parts in float32, {shape} {layers}×{width}, {batch}×{context} tokens", unit="tokens/s",
                   value=value, peer=peer, ratio=value / peer if peer else None, spread=spread(ours), peer_spread=spread(theirs) if theirs else None)


def laptop_share(precision):
    """Share of the matrix-product rate, measured before and after, that a step of the laptop preset reaches (6 · N FLOPs a token)."""
    library = prepared_library()
    settings = library.make_settings("laptop", precision=precision)
    precision, before = best_precision(library, settings)
    config = library.make_config(settings, settings.vocab_size)
    tokens = torch.randint(settings.vocab_size, (100_000,))
    seconds = library.dress_rehearsal(settings, config, tokens, torch.device("cpu"), precision, steps=30)
    rate = max(before[precision], library.matmul_rate(precision, torch.device("cpu")))
    tokens_per_step = settings.batch_size * settings.accumulation_steps * settings.context_length
    return {"share": 6 * library.matrix_parameters(config) * tokens_per_step / seconds / 1e9 / rate, "rate": rate, "seconds": seconds,
            "precision": str(precision)[6:]}


def row_6(options):
    runs = [in_process("laptop_share", precision=options.precision) for _ in range(options.seeds)]
    values = [run["share"] for run in runs]
    yield dict(row=6, what="share of the matrix-product rate that a laptop training step reaches", unit="share", value=statistics.median(values),
               peer=None, ratio=None, spread=spread(values), precision=runs[0]["precision"],
               matrix_rate=[round(run["rate"]) for run in runs], step_milliseconds=[round(1000 * run["seconds"], 1) for run in runs])


# With and without torch.compile, and on a GPU

def kept_for_backward(compile, shape="laptop preset"):
    """Bytes that a forward pass in float32 with GPT-2's parts keeps for the backward pass, on the CPU: the notebook's own count."""
    width, heads, layers, context, batch, vocabulary = STEP_SHAPES[shape]
    library = prepared_library()
    plain = library.GPT
    library.GPT = (lambda config: torch.compile(plain(config))) if compile == "yes" else plain
    return library.kept_bytes(library.GPTConfig(vocabulary, context, layers, heads, width), batch)


def row_compile(options):
    """Steps of the laptop preset in its own precision, with and without the compiler, in turn; and what each keeps in memory."""
    width, heads, layers, context, batch, vocabulary = STEP_SHAPES["laptop preset"]
    precision = options.precision
    if precision == "auto":
        precision = str(best_precision(load_library(), load_library().make_settings("laptop"))[0])[6:]
    rates, kept = {}, {choice: in_process("kept_for_backward", compile=choice) for choice in ("no", "yes")}
    for _ in range(options.seeds):
        for choice in ("no", "yes"):
            run = in_process("our_step", shape="laptop preset", precision=precision, compile=choice, classic=False)
            rates.setdefault(choice, []).append(batch * context / run["seconds"])
    value, peer = statistics.median(rates["yes"]), statistics.median(rates["no"])
    yield dict(row="compile", what=f"training step of the laptop preset, compiled against plain, {precision}", unit="tokens/s", value=value, peer=peer,
               ratio=value / peer, spread=spread(rates["yes"]), peer_spread=spread(rates["no"]))
    yield dict(row="compile", what="kept for the backward pass, GPT-2's parts at the laptop preset's shape, compiled against plain, float32", unit="MB",
               value=kept["yes"] / 1e6, peer=kept["no"] / 1e6, ratio=kept["yes"] / kept["no"], spread=None)


def row_gpu(options):
    """Ours against nanoGPT at the settings of its config files, bfloat16, on CUDA; ours with and without the compiler."""
    if not torch.cuda.is_available():
        raise SystemExit("the row gpu needs a CUDA GPU, and PyTorch sees none here")
    library = load_library()
    rate = library.matmul_rate(torch.bfloat16, torch.device("cuda")) * 1e9
    for shape, (width, heads, layers, context, batch, vocabulary, _) in GPU_SHAPES.items():
        config = library.GPTConfig(vocabulary, context, layers, heads, width)
        runs = {}
        for _ in range(options.seeds):
            common = dict(shape=shape, device="cuda", precision="bfloat16")
            runs.setdefault("plain", []).append(in_process("our_step", **common))
            runs.setdefault("compiled", []).append(in_process("our_step", **common, compile="yes"))
            if options.nanogpt:
                runs.setdefault("nanoGPT", []).append(in_process("nanogpt_step", **common, compile="yes", nanogpt=options.nanogpt))
        speed = {name: statistics.median(batch * context / run["seconds"] for run in taken) for name, taken in runs.items()}
        used = {name: round(speed[name] * library.flops_per_token(config, context) / rate, 3) for name in speed}
        peer = speed.get("nanoGPT")
        yield dict(row="gpu", what=f"training step, {shape}, bfloat16, compiled", unit="tokens/s", value=speed["compiled"], peer=peer,
                   ratio=speed["compiled"] / peer if peer else None, spread=spread([batch * context / run["seconds"] for run in runs["compiled"]]),
                   plain=speed["plain"], utilisation=used, gigabytes={name: round(taken[0]["bytes"] / 1e9, 2) for name, taken in runs.items()},
                   matrix_rate=round(rate / 1e12), card=torch.cuda.get_device_name())


# Rows 7 and 8: generation

def our_generation():
    library = prepared_library()
    settings = library.make_settings("laptop", n_embd=256, n_head=4)
    model = library.GPT(library.make_config(settings, 2048))
    def write():
        start = time.perf_counter()
        assert sum(1 for _ in library.stream_tokens(model, torch.zeros(1, 1, dtype=torch.int64), 255, seed=0)) == 255
        return 255 / (time.perf_counter() - start)
    return statistics.median([write() for _ in range(6)][1:])


def nanogpt_generation(nanogpt):
    sys.path.insert(0, nanogpt)
    import model as peer
    network = peer.GPT(peer.GPTConfig(block_size=256, vocab_size=2048, n_layer=4, n_head=4, n_embd=256, dropout=0.0, bias=True)).eval()
    def write():
        start = time.perf_counter()
        network.generate(torch.zeros(1, 1, dtype=torch.int64), 255)
        return 255 / (time.perf_counter() - start)
    return statistics.median([write() for _ in range(6)][1:])


def transformers_generation():
    import transformers
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=2048, n_positions=256, n_embd=256, n_layer=4, n_head=4)).eval()
    def write():
        start = time.perf_counter()
        with torch.no_grad():
            written = network.generate(torch.zeros(1, 1, dtype=torch.int64), attention_mask=torch.ones(1, 1, dtype=torch.int64), do_sample=True,
                                       top_k=0, min_new_tokens=255, max_new_tokens=255, pad_token_id=0)
        assert written.shape == (1, 256)
        return 255 / (time.perf_counter() - start)
    return statistics.median([write() for _ in range(6)][1:])


def row_7_and_8(options, rows):
    for row, name, task, arguments, there in ((7, "nanoGPT's generate", "nanogpt_generation", {"nanogpt": options.nanogpt}, options.nanogpt),
                                              (8, "transformers' generate with its cache", "transformers_generation", {},
                                               importlib.util.find_spec("transformers"))):
        if row in rows:
            ours, theirs = [], []
            for _ in range(options.seeds):
                ours.append(in_process("our_generation"))
                if there:
                    theirs.append(in_process(task, **arguments))
            value, peer = statistics.median(ours), statistics.median(theirs) if theirs else None
            yield dict(row=row, what=f"generation, batch 1, 255 tokens from one, 4×256, 2,048 tokens, against {name}", unit="tokens/s", value=value,
                       peer=peer, ratio=value / peer if peer else None, spread=spread(ours), peer_spread=spread(theirs) if theirs else None)


# Row 9: the tokenizer's training

def python_texts(folder):
    os.chdir(folder)
    import contextlib
    with contextlib.redirect_stdout(None):
        return list(execute_cells(code_cells("## 5 ", {}))["splits"]["train"])


def our_bpe(texts, vocab_size):
    library, texts = load_library(), json.loads(pathlib.Path(texts).read_text())
    start = time.perf_counter()
    merges = library.train_bpe(texts, vocab_size, pattern=library.SPLIT_PATTERNS["code"])
    return time.perf_counter() - start, len(merges)


def rust_bpe(texts, vocab_size):
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers
    library, texts = load_library(), json.loads(pathlib.Path(texts).read_text())
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(library.SPLIT_PATTERNS["code"]), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    start = time.perf_counter()
    tokenizer.train_from_iterator(texts, trainer)
    return time.perf_counter() - start, tokenizer.get_vocab_size() - 257


def minbpe_bpe(texts, vocab_size, minbpe):
    sys.path.insert(0, minbpe)
    from minbpe import RegexTokenizer
    library, texts = load_library(), json.loads(pathlib.Path(texts).read_text())
    text, tokenizer = "\n".join(texts), RegexTokenizer(library.SPLIT_PATTERNS["code"])
    start = time.perf_counter()
    tokenizer.train(text, vocab_size - 1)                     # it counts no special token
    return time.perf_counter() - start, len(tokenizer.merges)


def row_9(options):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "texts.json")
        pathlib.Path(path).write_text(json.dumps(in_process("python_texts", folder=folder)))
        ours, rust = [], []
        for _ in range(options.seeds):
            ours.append(in_process("our_bpe", texts=path, vocab_size=2048)[0])
            if importlib.util.find_spec("tokenizers"):
                rust.append(in_process("rust_bpe", texts=path, vocab_size=2048)[0])
        value, peer = statistics.median(ours), statistics.median(rust) if rust else None
        yield dict(row=9, what="train_bpe, python corpus, 2,048 tokens, against tokenizers' Rust trainer", unit="seconds", value=value, peer=peer,
                   ratio=value / peer if peer else None, spread=spread(ours), peer_spread=spread(rust) if rust else None)
        if options.minbpe:
            small = 257 + options.merges
            value = statistics.median(in_process("our_bpe", texts=path, vocab_size=small)[0] for _ in range(options.seeds))
            peer = in_process("minbpe_bpe", texts=path, vocab_size=small, minbpe=options.minbpe)[0]
            yield dict(row=9, what=f"train_bpe, python corpus, the first {options.merges} merges, against minbpe", unit="seconds", value=value,
                       peer=peer, ratio=value / peer, spread=None)


# Row 10: how soon a second run trains

def time_to_first_step(folder, started):
    """Runs the notebook's cells in order; stops after the first training step of section 9. `started`: time.time() before the process."""
    os.chdir(folder)
    sources, stopped = code_cells("## 10 ", {}), []

    def first_step(*arguments, **options):
        settings = dataclasses.replace(arguments[3], max_steps=1)
        real(*arguments[:3], settings, *arguments[4:7])
        stopped.append(time.time() - started)
        raise KeyboardInterrupt
    space, real = {"__name__": "benchmark"}, None
    import builtins
    import contextlib
    from matplotlib import pyplot
    builtins.display = lambda *things: None
    with contextlib.redirect_stdout(None):
        for source in sources:
            if "save, starts)" in source and "Progress(" in source:
                real, space["train"] = space["train"], first_step
                space["reuse_checkpoint"] = False
            try:
                exec(compile(source, "cell", "exec"), space)
            except KeyboardInterrupt:
                return stopped[0]
            pyplot.close("all")
    raise AssertionError("no cell of section 9 trained")


def row_10(options):
    with tempfile.TemporaryDirectory() as folder:
        first, *again = [in_process("time_to_first_step", folder=folder, started=time.time()) for _ in range(options.seeds + 1)]
    yield dict(row=10, what="start to first trained step on a second run", unit="seconds", value=statistics.median(again), peer=None, ratio=None,
               spread=spread(again), first_run=round(first, 1))


# Memory of sections 2 to 4

MEMORY_CHILD = """
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


def private_bytes(pid):
    """Resident pages that belong to no file."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * int(match.group(1)) if (match := re.search(r"RssAnon:\s+(\d+)", status)) else 0


def row_memory(options):
    if not os.path.exists("/proc/self/status"):
        raise SystemExit("the row memory needs Linux: it reads /proc")
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            write_text(folder / "corpus.txt", megabytes)
            changes = dict(corpus=str(folder / "corpus.txt"), corpus_megabytes=2.0 * megabytes)
            (folder / "cells.json").write_text(json.dumps(code_cells("## 5 ", changes)), encoding="utf-8")
            start, most = time.perf_counter(), 0
            with subprocess.Popen([sys.executable, "-c", MEMORY_CHILD], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
                lines = []
                reader = threading.Thread(target=lambda: lines.extend(process.stdout))
                reader.start()
                while process.poll() is None:
                    most = max(most, private_bytes(process.pid))
                    time.sleep(0.05)
                reader.join()
            if process.returncode:
                raise SystemExit(f"{megabytes} MB failed:\n" + "".join(lines[-20:]))
            seconds = time.perf_counter() - start
        yield dict(row="memory", what=f"sections 2 to 4 on {megabytes} MB of generated text, most private memory", unit="GB", value=most / 1e9,
                   peer=None, ratio=None, spread=None, seconds=round(seconds, 1), seconds_per_megabyte=round(seconds / megabytes, 2),
                   training_tokens=int(lines[-1].split()[1]))


def measurements(options):
    rows = options.rows
    if {1, 2, 3} & set(rows):
        yield from row_1_to_3(options, rows)
    for row, function in ((4, row_4), (5, row_5), (6, row_6)):
        if row in rows:
            yield from function(options)
    if {7, 8} & set(rows):
        yield from row_7_and_8(options, rows)
    for row, function in ((9, row_9), (10, row_10), ("memory", row_memory), ("compile", row_compile), ("gpu", row_gpu)):
        if row in rows:
            yield from function(options)


def parse_rows(text):
    rows = [int(part) if part.isdigit() else part for part in text.split(",")]
    if wrong := [row for row in rows if row not in (*range(1, 11), "memory", "compile", "gpu")]:
        raise argparse.ArgumentTypeError(f"row {wrong[0]!r} is unknown; the rows are 1 to 10, memory, compile and gpu")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=parse_rows, default=[5, 6, 7, 8, 9, 10], help="1 to 10, memory, compile and gpu, with commas between; default 5,6,7,8,9,10")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--seeds", type=int, default=3, help="how often each measurement is taken (default 3)")
    parser.add_argument("--nanogpt", type=os.path.abspath, help="path of a checkout of nanoGPT")
    parser.add_argument("--minbpe", type=os.path.abspath, help="path of a checkout of minbpe")
    parser.add_argument("--shakespeare", type=os.path.abspath, help="path of Tiny Shakespeare as a text file")
    parser.add_argument("--seconds", type=float, default=118.0, help="time of row 1 where nanoGPT is not at hand (default 118)")
    parser.add_argument("--minutes", type=float, default=10.0, help="time of row 3 (default 10)")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="in which ours trains in rows 1 to 4 and 6 (default auto: bfloat16 where a measurement shows that it is faster)")
    parser.add_argument("--merges", type=int, default=100, help="merges of row 9 against minbpe, which is slow (default 100)")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 256, 1024], help="sizes of the row memory")
    options = parser.parse_args()
    for result in measurements(options):
        result = {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}
        if options.json:
            print(json.dumps(result), flush=True)
        else:
            against = f", peer {result['peer']} (ratio {result['ratio']})" if result.get("ratio") else ""
            rest = {name: value for name, value in result.items() if name not in ("row", "what", "unit", "value", "peer", "ratio") and value is not None}
            print(f"row {result['row']}: {result['what']}: {result['value']} {result['unit']}{against}  {rest}", flush=True)


if __name__ == "__main__":
    main()

"""Timings of the notebook's own `define` cells, alone and against other people's code. Not a test.

    python tests/benchmarks.py --rows 5,6,7 --json

Rows: 3 trains models (minutes to hours), 5 to 9 take seconds to minutes. A peer is compared with
where its path is given (--nanogpt: a checkout of the public repository) or where it is installed
(transformers, tokenizers). Row 3 needs Tiny Shakespeare as a file (--shakespeare).
Each measurement that is compared runs in a process of its own, the two sides in turn.
"""
import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from conftest import load_library, run_cells

CPU = torch.device("cpu")
LONG_RUN_DROPOUT = 0.05  # for more than 5 minutes; in 4 it costs more than it gains
SHAKESPEARE = dict(n_layer=4, n_embd=256, n_head=4, vocab_size=257, windows="anywhere",  # bytes
                   context_length=256, batch_size=8)  # max_steps is what fits into the time
LIKE_NANOGPT = dict(activation="gelu", warmup_steps=100)  # where it differs from CLASSIC
NANOGPT_A100 = 1.4697  # nats per character that its README gives for its GPU recipe
STEP_SHAPES = {  # width, heads, layers, context, batch, vocabulary, dropout
    "nanoGPT's CPU recipe": (128, 4, 4, 64, 12, 65, 0.0),
    "laptop preset": (192, 3, 4, 512, 4, 2048, 0.0),
    "width 256": (256, 4, 4, 256, 8, 2048, 0.0),
}


# What the rows have in common

def in_process(task, **arguments):
    """The result (plain values) of the function of that name, run in a new Python process."""
    program = (f"import sys, json; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); "
               f"import benchmarks; result = benchmarks.{task}(**json.loads(sys.argv[1])); "
               f"print(chr(30) + json.dumps(result))")  # a sign that JSON writes out otherwise
    done = subprocess.run([sys.executable, "-c", program, json.dumps(arguments)], text=True,
                          capture_output=True,
                          env={**os.environ, "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout[done.stdout.rindex(chr(30)) + 1:])


def in_turn(options, ours, theirs=None):
    """Runs ours, and theirs if there is one, options.seeds times each: two lists."""
    results = [], []
    for _ in range(options.seeds):
        for side, run in zip(results, (ours, theirs)):
            if run:
                side.append(run())
    return results


def spread(values):
    return [round(min(values), 4), round(max(values), 4)] if values else None


def row(number, what, unit, values, peers=(), **more):
    """What is printed of a row: medians, their ratio, and the extremes."""
    value, peer = statistics.median(values), statistics.median(peers) if peers else None
    return dict(row=number, what=what, unit=unit, value=value, peer=peer,
                ratio=value / peer if peer else None, spread=spread(values),
                peer_spread=spread(peers), **more)


def prepared_library():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return load_library()


def train_for(library, seconds, settings, tokens, precision, steps=None):
    """A new model, trained for about so many seconds, by the steps of a timing run; or for steps.

    → model, seconds, steps.
    """
    config = library.make_config(settings, settings.vocab_size)
    if not steps:
        step = library.timing_run(settings, config, tokens, CPU, precision, steps=40)
        steps = max(1, int(0.92 * seconds / step))  # 8% in reserve for slower moments
    settings = dataclasses.replace(settings, max_steps=steps)
    run = library.new_run(settings, config, precision=precision)
    history = library.train(run, tokens, show=False)
    return run.model, history["seconds"], steps


def preprocessed(folder, changes={}):
    """The namespace of the notebook after its sections 0 to 3, run in a folder, in silence."""
    from matplotlib import pyplot
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        space = run_cells(0, 3, f'preset, changes = "laptop", {changes!r}')
        pyplot.close("all")
    return space


# Row 3: Tiny Shakespeare

def shakespeare_tokens(path):
    """The first nine tenths and the last tenth of the text, one token per byte."""
    tokens = torch.tensor(list(pathlib.Path(path).read_bytes()))
    cut = int(0.9 * len(tokens))
    return tokens[:cut], tokens[cut:]


def whole_losses(library, model, tokens):
    """Nats per character of the whole text: windows side by side, and with half a window before."""
    losses = functools.partial(library.per_token_losses, model, tokens)
    return {"side_by_side": float(losses(stride=model.config.context_length).mean()),
            "half_overlap": float(losses().mean())}


def our_shakespeare(path, seconds, seed, precision, steps=None):
    library = prepared_library()
    training, validation = shakespeare_tokens(path)
    settings = library.make_settings("laptop", seed=seed, precision=precision, dropout=(
        LONG_RUN_DROPOUT if seconds > 300 else 0.0), **SHAKESPEARE)
    precision, _ = library.choose_precision(settings, CPU)
    model, taken, steps = train_for(
        library, seconds, settings, training, precision, steps=steps)
    return {"seconds": taken, "steps": steps, "precision": str(precision)[6:],
            **whole_losses(library, model, validation)}


def row_3(options):
    if not options.shakespeare:
        raise SystemExit("row 3 needs --shakespeare, the path of Tiny Shakespeare's text")
    counts = options.steps or [None] * len(options.minutes)
    for minutes, count in zip(options.minutes, counts):
        taken = [in_process("our_shakespeare", path=options.shakespeare, seconds=60 * minutes,
                            seed=seed, precision=options.precision, steps=count)
                 for seed in range(1, options.seeds + 1)]
        yield row(3, f"Tiny Shakespeare in {minutes:g} minutes, whole validation set",
                  "nats per character", [run["side_by_side"] for run in taken], [NANOGPT_A100],
                  seconds=[round(run["seconds"], 1) for run in taken],
                  half_overlap=statistics.median(run["half_overlap"] for run in taken),
                  steps=[run["steps"] for run in taken], precision=taken[0]["precision"])


# Rows 5 and 6: a training step

def timed_steps(step, steps):
    """Median seconds of a step."""
    times = []
    for i in range(steps):
        start = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - start)
    return dict(seconds=statistics.median(times[3:]))


def our_step(shape, steps=25):
    """With GPT-2's parts (but exact GELU, as nanoGPT's) and AdamW."""
    width, heads, layers, context, batch, vocabulary, dropout = STEP_SHAPES[shape]
    library = prepared_library()
    settings = library.make_settings("laptop", **{
        **library.CLASSIC, **LIKE_NANOGPT, "n_embd": width, "n_head": heads, "n_layer": layers,
        "context_length": context, "batch_size": batch, "accumulation_steps": 1,
        "dropout": dropout})
    run = library.new_run(settings, library.make_config(settings, vocabulary))
    tokens = torch.randint(vocabulary, (100_000,))
    return timed_steps(lambda i: library.training_step(run, tokens), steps)


def nanogpt_step(shape, nanogpt, steps=25):
    """The same with nanoGPT's model and optimiser, in the order of its train.py."""
    sys.path.insert(0, nanogpt)
    import model as peer
    width, heads, layers, context, batch, vocabulary, dropout = STEP_SHAPES[shape]
    network = peer.GPT(peer.GPTConfig(context, vocabulary, layers, heads, width, dropout))
    optimizer = network.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    tokens = torch.randint(vocabulary, (100_000,))

    def step(i):
        first = torch.randint(len(tokens) - context, (batch,))
        pair = [torch.stack([tokens[at + d:at + d + context] for at in first]) for d in (0, 1)]
        loss = network(*pair)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return timed_steps(step, steps)


def row_5(options):
    for shape, (width, _, layers, context, batch, *_) in STEP_SHAPES.items():
        rate = lambda task, **more: lambda: (
            batch * context / in_process(task, shape=shape, **more)["seconds"])
        yield row(5, f"training step, GPT-2's parts in float32, {shape} {layers}×{width}, "
                  f"{batch}×{context} tokens", "tokens/s", *in_turn(
                      options, rate("our_step"), options.nanogpt and rate(
                          "nanogpt_step", nanogpt=options.nanogpt)))


def laptop_fraction(precision):
    """Fraction of the matrix-product rate, measured before and after, that a step reaches."""
    library = prepared_library()
    settings = library.make_settings("laptop", precision=precision)
    precision, before = library.choose_precision(settings, CPU)
    config = library.make_config(settings, settings.vocab_size)
    tokens = torch.randint(settings.vocab_size, (100_000,))
    seconds = library.timing_run(settings, config, tokens, CPU, precision, steps=30)
    rate = max(before[precision], library.matmul_rate(precision, CPU))
    count = settings.batch_size * settings.accumulation_steps * settings.context_length
    flops = library.flops_per_token(config) * count      # as section 8 counts
    return {"fraction": flops / seconds / 1e9 / rate, "rate": rate, "seconds": seconds,
            "precision": str(precision)[6:]}


def row_6(options):
    runs, _ = in_turn(options, lambda: in_process("laptop_fraction", precision=options.precision))
    yield row(6, "fraction of the matrix-product rate that a laptop training step reaches",
              "fraction", [run["fraction"] for run in runs], precision=runs[0]["precision"],
              matrix_rate=[round(run["rate"]) for run in runs],
              step_milliseconds=[round(1000 * run["seconds"], 1) for run in runs])


# Rows 7 and 8: generation

START = torch.zeros(1, 1, dtype=torch.int64)


def tokens_per_second(generate):
    """The median of five calls, after one that warms up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        generate()
        times.append(255 / (time.perf_counter() - start))
    return statistics.median(times[1:])


def our_generation():
    library = prepared_library()
    settings = library.make_settings("laptop", n_embd=256, n_head=4)
    model = library.GPT(library.make_config(settings, 2048)).eval()
    return tokens_per_second(lambda: list(library.stream_tokens(model, START, 255, seed=0)))


def nanogpt_generation(nanogpt):
    sys.path.insert(0, nanogpt)
    import model as peer
    network = peer.GPT(peer.GPTConfig(256, 2048, 4, 4, 256, 0.0)).eval()
    return tokens_per_second(lambda: network.generate(START, 255))


def transformers_generation():
    import transformers
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=2048, n_positions=256, n_embd=256, n_layer=4, n_head=4)).eval()
    return tokens_per_second(lambda: network.generate(
        START, attention_mask=torch.ones_like(START), do_sample=True, top_k=0, min_new_tokens=255,
        max_new_tokens=255, pad_token_id=0))


def rows_7_and_8(options):
    there = importlib.util.find_spec("transformers")
    for number, name, peer in (
            (7, "nanoGPT's generate", options.nanogpt and functools.partial(
                in_process, "nanogpt_generation", nanogpt=options.nanogpt)),
            (8, "transformers' generate with its cache", there and functools.partial(
                in_process, "transformers_generation"))):
        if number in options.rows:
            yield row(number, f"generation, batch 1, 255 tokens from one, 4×256, 2,048 tokens, "
                      f"against {name}", "tokens/s", *in_turn(
                          options, lambda: in_process("our_generation"), peer))


# Row 9: the tokenizer's training

def train_merges(trainer, texts):
    """Seconds for 2,048 tokens, by "ours" or by "rust" (tokenizers)."""
    library, texts = load_library(), json.loads(pathlib.Path(texts).read_text())
    pattern = library.SPLIT_PATTERNS["code"]
    if trainer == "ours":
        train = lambda: library.train_bpe(texts, 2048, pattern=pattern)
    else:
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers
        tokenizer, level = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            level(add_prefix_space=False, use_regex=False)])
        by_rust = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<|endoftext|>"],
                                      show_progress=False, initial_alphabet=level.alphabet())
        train = lambda: tokenizer.train_from_iterator(texts, by_rust)
    start = time.perf_counter()
    train()
    return time.perf_counter() - start


def write_training_texts(folder, path):
    texts = list(preprocessed(folder)["splits"]["train"])
    pathlib.Path(path).write_text(json.dumps(texts))


def row_9(options):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "texts.json")
        in_process("write_training_texts", folder=folder, path=path)
        seconds = lambda trainer: lambda: in_process("train_merges", trainer=trainer, texts=path)
        there = importlib.util.find_spec("tokenizers")
        yield row(9, "train_bpe, python corpus, 2,048 tokens, against tokenizers' Rust trainer",
                  "seconds", *in_turn(options, seconds("ours"), there and seconds("rust")))


ROWS = {3: row_3, 5: row_5, 6: row_6, **dict.fromkeys((7, 8), rows_7_and_8), 9: row_9}


def parse_rows(text):
    rows = [int(part) if part.isdigit() else part for part in text.split(",")]
    if wrong := [name for name in rows if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"row {wrong[0]!r} is none of {', '.join(map(str, ROWS))}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=parse_rows, default=[5, 6, 7, 8, 9],
        help=f"with commas between: {', '.join(map(str, ROWS))}; default 5 to 9")
    add("--json", action="store_true", help="one JSON object per row")
    add("--seeds", type=int, default=3, help="how often each is measured (default 3)")
    add("--nanogpt", type=os.path.abspath, help="path of a checkout of nanoGPT")
    add("--shakespeare", type=os.path.abspath, help="path of Tiny Shakespeare as a text file")
    add("--minutes", type=float, nargs="+", default=[10.0], help="times of row 3 (default 10)")
    add("--steps", type=int, nargs="+", help="as many steps for each of them, whatever they take")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of ours in rows 3 and 6 (default auto: bfloat16 where it is faster)")
    options = parser.parse_args()
    if options.steps and len(options.steps) != len(options.minutes):
        parser.error("--steps needs as many numbers as --minutes")
    for function in dict.fromkeys(ROWS[name] for name in ROWS if name in options.rows):
        for result in function(options):
            result = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
            shown = {name: value for name, value in result.items() if value is not None}
            print(json.dumps(result) if options.json
                  else "row {row}: {what}: {value} {unit}; ".format(
                **shown) + str({k: shown[k] for k in list(shown)[4:]}), flush=True)


if __name__ == "__main__":
    main()

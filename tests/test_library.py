"""The notebook's definitions against independent references, and properties that must hold for any
input."""
import ast
import contextlib
import gzip
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import referees
from conftest import cells_with_tag, code_cells

FORBIDDEN = (
    r"nn\.(Transformer|Multihead|LayerNorm|RMSNorm|Linear|Embedding|Dropout|GELU|functional)"
    r"|CrossEntropyLoss"
             r"|\bF\.|scaled_dot_product_attention\(.*attn_mask|optim\.(AdamW|Adam|SGD|Muon)\b")
python_like = st.text(alphabet="abn =-\n(')1", max_size=60)


@pytest.fixture(scope="module")
def tokenizer(library):
    texts = ["def f(x):\n    return x + 1", "for item in items:\n        print(item)",
             "the the then naïve 東京"]
    return library.build_tokenizer(library.train_bpe(texts * 3, 330))


@pytest.fixture(scope="module")
def model(library, tokenizer):
    return referees.scrambled(library, referees.small_config(library,
        vocab_size=tokenizer.n_vocab)).float()


@pytest.mark.parametrize("reference", referees.REFERENCES, ids=lambda f: f.__name__)
def test_against_a_reference(library, reference):
    reference(library)


def test_define_cells_use_no_premade_parts():
    assert not [found.group() for source in cells_with_tag("define")
                if (found := re.search(FORBIDDEN, source))]


def bound_names(tree):
    """Names that running these statements binds in the notebook's own namespace."""
    scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp,
              ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if not isinstance(node, scopes):
            yield from bound_names(node)


def test_no_cell_rebinds_a_function_or_what_a_define_cell_has_bound():
    bound, kept = [], []
    for source, cell in (("".join(cell["source"]), cell) for _, cell in code_cells()):
        tree = ast.parse(source)
        named = {node.name for node in tree.body if hasattr(node, "name")}
        imported = {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree)
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        bound.append(named | set(bound_names(tree))
                     | (imported if "define" in cell["metadata"].get("tags", []) else set()))
        kept.append(bound[-1] if "define" in cell["metadata"].get("tags", []) else named)
    assert not [a & b for i, a in enumerate(kept) for j, b in enumerate(bound) if i != j and a & b]


@given(st.text(max_size=200))
def test_round_trip_of_any_text(library, tokenizer, text):
    text = text.encode("utf-8", "replace").decode()
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.eot_token not in tokenizer.encode_ordinary(text + library.END_OF_TEXT)
    assert all("".join(library.regex.findall(pattern, text)) == text
               for pattern in library.SPLIT_PATTERNS.values())


@given(python_like, st.lists(python_like, min_size=1, max_size=5))
def test_fast_trainer_and_encoder_equal_the_plain_ones(library, text, corpus):
    for pattern in library.SPLIT_PATTERNS.values():
        merges = library.train_bpe(corpus, 257 + 20, pattern=pattern)
        words = [word.encode() for line in corpus for word in library.regex.findall(pattern, line)]
        assert merges == library.train_bpe_plainly(words, 20)
        ids = library.build_tokenizer(merges, pattern=pattern).encode_ordinary(text)
        assert ids == library.encode_by_hand(text, merges, pattern)


def test_functions_in_python_files(library, tmp_path):
    source = (
        'class A:\n    def m(self):\n        """First. Second."""\n        def inner(): pass\n'
              '        return inner  # gone\n\nasync def f(): pass\n')
    method = 'def m(self):\n    """First."""\n\n    def inner():\n        pass\n    return inner'
    names = "b/a.py", "tests/d.py", "e.txt", "test_f.py", "g.py", "h.py", "i.py"
    for name, text in zip(names, [source] * 4 + ["def g(:", "\x00", "(" * 9999], strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [(row["source"], row["text"]) for row in library.read_functions(tmp_path)] == [
        ("b/a.py", method), ("b/a.py", "async def f():\n    pass")]


def test_own_files_of_every_kind(library, tmp_path):
    def texts(corpus):
        return library.load_documents(library.make_settings(corpus=corpus,
            data_dir=str(tmp_path / "data")))["text"][:]
    (folder := tmp_path / "texts").mkdir()
    (folder / "a.txt").write_text("Hello.\n\nWörld.", encoding="utf-8-sig")
    (folder / "b.jsonl").write_text('{"text": "from json"}\n')
    library.datasets.Dataset.from_dict({"text": ["from parquet"]}).to_parquet(
        str(folder / "c.parquet"))
    for name, opened in (("d.py", open), ("e.py.gz", gzip.open)):
        with opened(folder / name, "wt") as file:
            file.write(f"def {name[0]}():\n    return 1\n")
    assert texts(str(folder)) == ["Hello.\n\nWörld.", "from json", "from parquet",
                                  "def d():\n    return 1",
                                  "def e():\n    return 1"]
    (folder / "a.txt").write_text("Changed: the cache must notice.")
    assert texts(f"{folder}/*.txt") == ["Changed: the cache must notice."]


def test_the_column_that_is_named_is_read(library, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "no", "story": "one"}\n{"text": "no", "story": "two"}\n')
    (tmp_path / "b.csv").write_text("text,story\nno,three\n")
    settings = library.make_settings(corpus=str(tmp_path), text_column="story",
                                     data_dir=str(tmp_path / "data"))
    assert library.load_documents(settings)["text"][:] == ["one", "two", "three"]


def test_shakespeare_is_read_whole(library, tmp_path, monkeypatch):
    text = "\n\n".join(f"FIRST:\nLine {i}, and more of it." for i in range(500))
    (tmp_path / "input.txt").write_text(text)
    monkeypatch.setattr(library.datasets.DownloadManager, "download",
                        lambda *_: str(tmp_path / "input.txt"))
    rows = list(library.read_network("shakespeare"))
    assert "".join(row["text"] for row in rows) == text
    assert [row["source"] for row in rows] == [f"shakespeare#{i // 8}" for i in range(len(rows))]


@pytest.mark.parametrize("corpus", ["shakespeare", "tinystories"])
def test_a_network_out_of_reach_is_one_sentence(library, monkeypatch, corpus):
    for place, name in ((library.datasets, "load_dataset"),
                        (library.datasets.DownloadManager, "download")):
        monkeypatch.setattr(place, name, lambda *_, **__: open("/no/such/file"))
    with pytest.raises(ConnectionError,
                       match=f"^corpus: '{corpus}' can't be fetched .*; corpus='python' needs"):
        list(library.read_network(corpus))


@given(st.text(max_size=80))
def test_cleaning(library, text):
    row = library.normalise({"text": text})
    assert library.normalise(row) == row and row["bytes"] == len(row["text"].encode())
    assert not re.search("[\r\x00]|[ \t]\n|[ \t\n]$|^\n", row["text"])
    assert library.normalise({"text": "\r\n e\u0301 \rb\x00\t\r\n"})["text"] == " é\nb"


def test_copies_go_and_the_first_stays(library):
    words = [f"word{i}" for i in range(60)]
    texts = [" ".join(row) for row in (words, words + ["more"], words[:30] + words[:30:-1],
                                       ["quite different"] * 9)]
    assert library.drop_near_duplicates(texts, 0.5) == [0, 2, 3]
    assert library.drop_near_duplicates(["", "", "short", "short", "a b c d e"], 0.5) == [0, 2, 4]
    texts = [" ".join(map(str, row)) for row in np.random.default_rng(0).integers(50,
        size=(20, 200))]
    assert library.drop_near_duplicates(texts * 2, 0.5) == list(range(20))
    # a quarter as similar, but held out
    part, whole = " ".join(words[:20]), " ".join(words)
    assert library.drop_near_duplicates([part, whole]) == [0, 1] and library.drop_near_duplicates(
        [part, whole], held_out=1) == [0]


def test_a_copy_within_any_held_out_text_goes(library):
    """As plain sets say it."""
    rng = np.random.default_rng(0)
    held = [[str(n) for n in rng.integers(10**9, size=size)] for size in (40, 200, 90, 60)]
    own = lambda: [str(n) for n in rng.integers(10**9, size=60)]
    training = [held[1][:60], held[2][:30] + own(), held[3] + own() * 3, held[0][:10] + own(),
                held[1][50:90] + held[2][:30], own()]
    texts = [" ".join(words) for words in held + training]
    sets = [library.shingles(text) for text in texts]
    copies = {i for i in range(4, 10) if any(len(sets[i] & one) >= 0.5 * min(len(sets[i]), len(one))
                                             for one in sets[:4])}
    assert copies == {4, 6, 8}
    assert library.drop_near_duplicates(texts, 0.5, held_out=4) == sorted(set(range(10)) - copies)
    assert library.drop_near_duplicates(texts, 0.5, held_out=10) == library.drop_near_duplicates(
        texts, 0.5)


def test_near_duplicates_are_judged_one_by_one(library):
    """Pairs of known similarity are dropped about as often as the formula says, however many texts
    there are."""
    rng = np.random.default_rng(0)
    for alike in (0.9, 0.6, 0.3, 0.15):
        texts = []
        for _ in range(150):
            one = rng.integers(10**9, size=130)
            shared = round(126 * 2 * alike / (1 + alike)) + 4
            texts += [" ".join(map(str, one)),
                      " ".join(map(str, [*one[:shared], *rng.integers(10**9, size=130 - shared)]))]
        dropped = (300 - len(library.drop_near_duplicates(texts))) / 150
        assert abs(dropped - (1 - (1 - alike**3) ** 10)) < 0.12


def test_half_of_the_texts_keep_their_places(library):
    texts = list(map(str, range(1000)))
    mixed = library.scatter_half(texts)
    assert sorted(mixed) == sorted(texts)
    assert 450 < sum(a == b for a, b in zip(texts, mixed)) < 550


def test_the_longest_recited_part(library):
    training = torch.tensor([1, 2, 3, 4, 5, 9, 2, 3])
    rows = [[7, 2, 3, 4, 5, 7], [1, 2, 3], [9, 9], []]
    assert library.longest_recited(rows, training, 2) == [2, 3, 4, 5]
    assert library.longest_recited(rows[2:], training, 2) == []


def test_the_split_is_by_source(library):
    names = [f"module_{i}.py" for i in range(2000)] * 2
    table = library.datasets.Dataset.from_dict(
        {"text": names, "source": names, "bytes": [12] * 4000})
    parts = library.split_documents(library.add_sides(table,
                                                      library.make_settings(held_out_fraction=0.1)))
    assert sum(map(len, parts.values())) == 4000 == 2 * sum(len(set(part["source"]))
        for part in parts.values())
    assert all(abs(len(parts[name]) - size) < 130 for name,
               size in dict(train=3240, validation=400, test=360).items())
    validation = set(parts["validation"]["source"])
    assert {name: library.hash_fraction(name) < 0.1 for name in names} == {name: name in validation
        for name in names}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 20))
def test_windows_start_at_documents(library, lengths, context):
    tokens = torch.tensor([0] + [t for n in lengths for t in [1] * n + [0]])
    ends = (tokens == 0).nonzero()[:, 0].tolist()
    starts = library.window_starts(tokens, 0, context).tolist()
    assert starts == sorted(set(starts)) and all(s + context < len(tokens) for s in starts)
    assert set(starts) >= {e for e in ends[:-1] if e + context < len(tokens)}
    # inside a document: every half window, none near its end
    for a, b in zip(ends, ends[1:]):
        assert all((s - a) % (context // 2) == 0 and s + context // 2 < b for s in starts
                   if a < s < b)
    if (last := len(tokens) - context - 1) >= 0:
        inputs, targets = library.get_batch(torch.arange(len(tokens)), 64, context,
                                            starts=torch.tensor(starts).long())
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(context)) and torch.equal(targets,
            inputs + 1)
        assert set(inputs[:, 0].tolist()) <= set(starts or range(last + 1))


@given(st.lists(st.integers(0, 3), min_size=5, max_size=40), st.integers(1, 4),
       st.lists(st.integers(0, 3), max_size=5))
def test_ngram_against_counting_by_hand(library, tokens, order, history):
    def p(token, context):                      # the formula of section 10, word for word
        n = len(context)
        after = [tokens[i + n] for i in range(len(tokens) - n) if tokens[i:i + n] == context]
        shorter = p(token, context[1:]) if context else 1 / 5
        return (max(after.count(token) - 0.5, 0) + 0.5 * len(set(after)) * shorter) / len(
            after) if after else shorter
    ngram = library.NGram(torch.tensor(tokens), 5, order, discount=0.5)
    expected = [p(token, history[max(0, len(history) - order + 1):]) for token in range(5)]
    assert np.allclose(ngram.next_probabilities(history), expected)
    rows = [[p(token, tokens[max(0, i - n):i]) for n in range(order)] for i,
            token in enumerate(tokens)]
    assert np.allclose(library.ngram_scores(ngram, torch.tensor(tokens), 1),
                       -np.log2(rows[1:]).sum(0))


@given(st.lists(st.lists(st.integers(0, 3)), min_size=1), st.lists(st.integers(0, 3), min_size=1),
       st.integers(1, 4))
def test_shared_runs_against_a_plain_search(library, rows, training, length):
    there = [training[i:i + length] for i in range(len(training) - length + 1)]
    expected = [[row[i:i + length] in there for i in range(len(row) - length + 1)] for row in rows]
    assert [runs.tolist() for runs in library.shared_runs(rows, training, length)] == expected


def test_scorers(library, tokenizer):
    assert library.is_valid("def f():\n    pass")
    assert not any(map(library.is_valid, ("", "def f(", "x\x00", "[" * 10**5, "return 1",
                                          "def f(a, a): pass", "break", "x" + "()" * 10**5)))
    assert library.wilson_interval(8, 10) == pytest.approx((0.490, 0.943), abs=0.001)
    end, texts = tokenizer.eot_token, ["ab", "naïve", "x" * 9]
    tokens = torch.tensor([end] + [t for text in texts
                                   for t in [*tokenizer.encode_ordinary(text), end]])
    ratios = [(len(tokenizer.encode_ordinary(text)) + 1) / len(text.encode()) for text in texts]
    one_bit_each = torch.full((len(tokens) - 1,), math.log(2))
    assert library.bootstrap_interval(one_bit_each, tokens, texts, tokenizer) == pytest.approx(
        [min(ratios), max(ratios)])
    assert library.count_bytes(tokenizer, tokens) == 2 + 6 + 9


@given(st.integers(0, 999), st.sampled_from([0.1, 0.5, 0.9, 0.99]), st.integers(1, 60),
       st.sampled_from([0.3, 1, 2]))
def test_filters_against_plain_ones(library, seed, p, k, temperature):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    chances = torch.softmax(logits / temperature, -1).tolist()
    order = sorted(range(50), key=lambda i: -chances[i])
    fewest = next(n for n in range(1, 51) if sum(chances[i] for i in order[:n]) >= p)
    for options, kept in ((dict(top_k=k), order[:k]), (dict(top_p=p), order[:fewest]),
                          (dict(min_p=p), [i for i in order
                                           if chances[i] >= p * chances[order[0]]])):
        found = library.filter_logits(logits, temperature, **options)
        assert (found > -math.inf).nonzero()[:, 0].tolist() == sorted(kept)
        assert torch.equal(found[kept], logits[kept] / temperature)


class Fixed(torch.nn.Module):
    """A model whose logits are the same everywhere."""

    def __init__(self, library, logits):
        super().__init__()
        self.logits, self.config = torch.nn.Parameter(logits), library.GPTConfig(len(logits), 16, 1,
            1, 8)

    def forward(self, tokens, targets=None, cache=None):
        return self.logits.expand(*tokens.shape, -1), None


def test_numbers_at_the_edge(library, tokenizer):
    """A wild loss has an infinite perplexity; NaN is said, not written; top-p 1 cuts nothing;
    derivatives of derivatives hold."""
    wild = torch.zeros(tokenizer.n_vocab)
    wild[0] = 1e6
    assert library.evaluate(Fixed(library, wild), torch.ones(200, dtype=int), 500)[
        "perplexity"] == math.inf
    for options in (dict(temperature=0), dict(temperature=1.0), dict(top_k=3), dict(top_p=0.5),
                    dict(min_p=0.1)):
        with pytest.raises(AssertionError,
                           match="the model's numbers went wrong: its logits are NaN"):
            library.generate(Fixed(library, wild * math.nan), tokenizer, "a", 3, **options)
    assert library.filter_logits(torch.tensor([60.0, 0.0, -9.0]), 0.5, top_p=1.0).isfinite().all()
    x, targets = torch.randn(3, 7, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2, 3])
    for function in (library.rms_normalise, library.gelu, library.softmax,
                     lambda x: library.cross_entropy(x, targets),
                     lambda x: library.scaled_dot_product_attention(x, x, x,
                         torch.ones(3, 3, dtype=bool).tril())):
        assert torch.autograd.gradgradcheck(function, (x,))


def test_texts_go_on_with_and_without_cache_and_beyond_the_context(library, model):
    window = torch.tensor([[1, 2, 3], [6, 5, 4]])
    both = (library.stream_tokens(model, window, 50, temperature=0, use_cache=use)
            for use in (True, False))
    for cached, plain in zip(*both, strict=True):
        assert torch.equal(cached, plain) and torch.equal(cached,
            model(window)[0][:, -1].argmax(-1))
        window = torch.cat([window, plain[:, None]], 1)
        # its latter half, and the new token
        window = window[:, -9:] if window.shape[1] > 16 else window


def test_seeds_samples_and_the_end_of_text(library, model, tokenizer, monkeypatch):
    one, again, other = (library.generate(model, tokenizer, "x", 20, seed=seed, samples=3)
                         for seed in (5, 5, 6))
    assert one == again != other and len(set(one)) == 3
    rows = torch.tensor([[104, 105], [tokenizer.eot_token, 33], [33, tokenizer.eot_token], [7, 7]])
    monkeypatch.setattr(library, "stream_tokens", lambda *_, **__: iter(rows))
    texts = library.generate(model, tokenizer, "o", samples=2)
    assert texts == ["oh", "oi!"], "each to its end, and no further"
    with pytest.raises(AssertionError, match="the model has .* tokens, the tokenizer 257"):
        library.generate(model, library.build_tokenizer([]), "o")


def test_frozen_parameters_stay_and_the_rest_learns(library):
    tokens = torch.arange(200) % 50
    for optimizer in ("muon", "adamw"):
        for frozen in ("blocks", "blocks.1.attention", "token_embedding", ""):
            run = referees.small_run(library, 50, max_steps=3, optimizer=optimizer)
            before = {name: p.clone() for name, p in run.model.named_parameters()}
            for name, p in run.model.named_parameters():
                p.requires_grad = not name.startswith(frozen or "nothing")
            library.train(run, tokens, show=False)
            for name, p in run.model.named_parameters():
                assert torch.equal(p, before[name]) == bool(frozen
                    and name.startswith(frozen)), name


@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=0.5), dict(top_k=3),
                                     dict(top_p=0.6), dict(min_p=0.2, temperature=2.0)], ids=str)
def test_tokens_come_as_often_as_the_filtered_distribution_says(library, model, options):
    prompt, rounds = torch.tensor([[1, 2, 3]]).repeat(500, 1), 20
    logits = model(prompt[:1])[0][:, -1].detach()
    p = torch.softmax(library.filter_logits(logits,
                                            **{**dict(temperature=1.0, top_k=None, top_p=None,
                                                      min_p=None), **options}), -1)[0]
    drawn = torch.stack([next(library.stream_tokens(model, prompt, 1, seed=seed, **options))
                         for seed in range(rounds)]).flatten()
    seen = torch.bincount(drawn, minlength=len(p)).double()
    assert not seen[p == 0].any()
    error = (p * (1 - p) * len(drawn)).double().sqrt()
    assert ((seen - p * len(drawn)).abs() <= 5 * error + 1e-9 + 5 * (error < 1)).all()


def test_what_would_be_read_wrongly_is_refused(library, model):
    for action, words in ((lambda: library.train_bpe("one text", 300), "^texts must be several"),
                          (lambda: library.per_token_losses(model, torch.tensor([1])),
                           "^the text has 1 tokens"),
                          (lambda: library.evaluate(model, torch.tensor([], dtype=torch.int64), 1),
                           "^the text has 0 tokens")):
        with pytest.raises(AssertionError, match=words):
            action()


def test_sampling_and_scoring_give_the_mode_back_also_when_interrupted(library, model, tokenizer):
    tokens = torch.randint(50, (60,))
    for training in (True, False):
        model.train(training)
        library.generate(model, tokenizer, "a", 3, seed=0)
        library.per_token_losses(model, tokens)
        library.generate_simple(model, tokens[None, :3], 2, 1.0, torch.Generator())
        stream = library.stream_tokens(model, tokens[None, :3], 5)
        next(stream)
        del stream
        library.record_attention(model, tokens[None, :5]), library.logit_lens(model,
            tokens[None, :5])
        with contextlib.suppress(KeyboardInterrupt), model.blocks[0].register_forward_hook(
            interrupt):
            library.per_token_losses(model, tokens)
        assert all(module.training is training for module in model.modules())
        assert library.torch.is_grad_enabled()


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_logit_lens_begins_with_the_embedding_and_ends_with_the_model(library):
    for tied in (True, False):
        model = referees.scrambled(library, referees.small_config(library, tie_embeddings=tied))
        table, tokens = model.output, torch.arange(9)[None]
        expected = [model.final_norm(model.token_embedding(tokens)) @ table.weight.T,
                    model(tokens)[0]]
        assert torch.allclose(library.logit_lens(model, tokens)[::2], torch.cat(expected).float(),
                              atol=1e-4)


def test_recorded_attention_is_what_the_model_used(library, model, monkeypatch):
    used, original = [], library.attention_weights
    monkeypatch.setattr(library, "attention_weights",
                        lambda *arguments: used.append(original(*arguments)) or used[-1])
    recorded = library.record_attention(model, torch.arange(9)[None])
    assert all(torch.equal(ours, by_model[0]) for ours,
               by_model in zip(recorded, used[::2], strict=True))
    assert not any(layer._forward_hooks for layer in model.modules()), "no hook is left behind"


def test_roles_of_heads(library, model, tokenizer, monkeypatch):
    assert library.role_targets(["start", "f", "(", "x", ",", " [", "x", "])", "\n", " f",
                                 "y"]) == {
        "previous token": [-1, *range(10)], "first token": [-1, *[0] * 10],
        "same name earlier": [-1] * 6 + [3, -1, -1, 1, -1],
        "open bracket": [-1, -1, -1, 2, 2, 2, 5, 5, -1, -1, -1],
        "induction": [-1] * 6 + [4, -1, -1, 2, -1]}
    weights, row = torch.rand(2, 2, 5, 5), [tokenizer.eot_token, *b"a(b)"]
    monkeypatch.setattr(library, "record_attention", lambda *_: list(weights))
    found = library.role_weights(model, tokenizer, [row, row])
    assert torch.allclose(found["previous token"][0], weights.diagonal(-1, 2, 3).mean(-1))
    assert torch.equal(found["open bracket"][0], weights[:, :, 4, 2]) and found["open bracket"][
        1:] == (1 / 5, 2)

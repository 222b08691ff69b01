"""The notebook's definitions against independent references, properties and bad input."""
import ast
import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

import referees
from conftest import NOTEBOOK, ROOT, define_cells

FORBIDDEN = (r"nn\.Transformer", r"nn\.MultiheadAttention", r"scaled_dot_product_attention\(.*attn_mask", r"nn\.LayerNorm", r"nn\.RMSNorm",
             r"nn\.Linear", r"nn\.Embedding", r"nn\.Dropout", r"nn\.GELU", r"nn\.functional", r"\bF\.", r"CrossEntropyLoss",
             r"optim\.(AdamW|Adam|SGD|Muon)\b")


@pytest.mark.parametrize("referee", referees.REFEREES, ids=lambda f: f.__name__)
def test_against_referee(library, referee):
    referee(library)


def test_define_cells_use_no_premade_parts():
    from conftest import define_cells
    for source in define_cells():
        for pattern in FORBIDDEN:
            assert not re.search(pattern, source), (pattern, source[:80])


@pytest.fixture(scope="module")
def tokenizer(library):
    text = ["def f(x):\n    return x + 1", "for item in items:\n        print(item)", "the the then naïve 東京"] * 3
    return library.build_tokenizer(library.train_bpe(text, 330))


@given(st.text(max_size=200))
@hypothesis_settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(library, tokenizer, text):
    text = text.encode("utf-8", "replace").decode()
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.eot_token not in tokenizer.encode_ordinary(text + library.END_OF_TEXT)


@given(st.text(alphabet="abn =-\n", max_size=60), st.lists(st.text(alphabet="abn =-\n", min_size=1, max_size=40), min_size=1, max_size=5))
@hypothesis_settings(max_examples=80, deadline=None)
def test_fast_trainer_and_encoder_equal_the_plain_ones(library, text, corpus):
    for pattern in library.SPLIT_PATTERNS.values():
        words = [word.encode() for line in corpus for word in library.regex.findall(pattern, line)]
        merges = library.train_bpe(corpus, 257 + 20, pattern=pattern)
        assert merges == library.train_bpe_plainly(words, 20)
        assert library.build_tokenizer(merges, pattern=pattern).encode_ordinary(text) == library.encode_by_hand(text, merges, pattern)


@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.integers(1, 60))
@hypothesis_settings(max_examples=50, deadline=None)
def test_sampling_filters(library, seed, p, k):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    shares = torch.softmax(logits, -1)
    assert (library.filter_logits(logits, top_k=k) > -math.inf).sum() == min(k, 50)
    kept = library.filter_logits(logits, top_p=p) > -math.inf
    assert shares[kept].sum() >= p - 1e-5 and (kept.sum() == 1 or shares[kept].sum() - shares[kept].min() < p + 1e-5)
    assert torch.equal(library.filter_logits(logits, min_p=p) > -math.inf, logits >= logits.max() + math.log(p))


@pytest.mark.parametrize("changes, name", [
    (dict(n_head=5), "n_embd"), (dict(vocab_size=100), "vocab_size"), (dict(corpus="no such corpus"), "corpus"), (dict(preset="huge"), "preset"),
    (dict(position="rotari"), "position"), (dict(dropout=1.0), "dropout"), (dict(learning_rate=math.nan), "learning_rate"),
    (dict(max_steps="100"), "max_steps"), (dict(no_such_setting=1), "no_such_setting"), (dict(qk_norm=1), "qk_norm"),
    (dict(min_document_bytes=500, max_document_bytes=100), "min_document_bytes")])
def test_bad_settings_get_one_sentence(library, changes, name):
    with pytest.raises(ValueError, match=f"^{name} is ") as error:
        library.make_settings(**changes)
    assert "\n" not in str(error.value)


def test_parameter_formula(library):
    for changes in (dict(), dict(norm="layernorm", bias=True, tie_embeddings=True, position="learned"), dict(value_embedding=True, n_layer=3)):
        config = referees.small_config(library, **changes)
        assert sum(p.numel() for p in library.GPT(config).parameters()) == library.parameter_formula(config)


def test_the_smallest_gpt2_has_124_million_parameters(library):
    assert library.parameter_formula(library.GPTConfig()) == 124_439_808


def test_token_files_notice_damage(library, tokenizer, tmp_path, capsys):
    path, texts = tmp_path / "t.bin", ["one two", "", "three"]
    expected, size = library.load_tokens(path, texts, tokenizer, "stamp")
    assert size == sum(map(len, texts)) and tokenizer.decode(expected.tolist()) == library.END_OF_TEXT + "".join(t + library.END_OF_TEXT for t in texts)
    good, expected = path.read_bytes(), expected.copy()
    with pytest.raises(ValueError, match="another corpus"):
        library.read_tokens(path, "other stamp")
    flipped = bytearray(good)
    flipped[-3] ^= 1
    for bad in (good[:-1], good + b"x", bytes(flipped), good[:12], b"", b"x" * 50, good.replace(b'"bytes": 12', b'"bytes": 13')):
        path.write_bytes(bad)
        with pytest.raises(ValueError):
            library.read_tokens(path, "stamp")
        assert np.array_equal(library.load_tokens(path, texts, tokenizer, "stamp")[0], expected)
    assert os.listdir(tmp_path) == ["t.bin"] and "rebuilt" in capsys.readouterr().out


def test_ngram_against_counting_by_hand(library):
    tokens, d = [0, 1, 0, 1, 2, 0, 1, 0], 0.5
    model = library.NGram(tokens, 3, order=2, discount=d)
    unigram = [(c - d) / 8 + d * 3 / 8 / 3 for c in (4, 3, 1)]
    # 1 is followed by 0 twice and by 2 once
    expected = [(2 - d) / 3 + d * 2 / 3 * unigram[0], d * 2 / 3 * unigram[1], (1 - d) / 3 + d * 2 / 3 * unigram[2]]
    assert np.allclose(model.next_probabilities([1]), expected)


def make_run(library, **changes):
    settings = library.make_settings("smoke", context_length=16, n_embd=16, max_steps=12, batch_size=2, evaluations=2, dropout=0.1, **changes)
    config = library.make_config(settings, 300)
    torch.manual_seed(settings.seed)
    model = library.GPT(config)
    return settings, model, library.make_optimizers(model, settings), torch.Generator().manual_seed(1), library.new_history()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resume_is_exact(library, tmp_path, optimizer):
    tokens = torch.randint(300, (500,), generator=torch.Generator().manual_seed(0))
    settings, model, optimizers, generator, history = make_run(library, optimizer=optimizer, accumulation_steps=2)
    library.train(model, optimizers, tokens, settings, history, generator)
    path = tmp_path / "run.pt"
    settings2, model2, optimizers2, generator2, history2 = make_run(library, optimizer=optimizer, accumulation_steps=2)

    def stop_at_seven(h):
        if len(h["loss"]) == 7:
            raise KeyboardInterrupt
    save = lambda: library.save_checkpoint(path, model2, optimizers2, 7, history2, settings2, [(b"a", b"b")], generator2, "stamp")
    library.train(model2, optimizers2, tokens, settings2, history2, generator2, report=stop_at_seven, save=save, save_every=math.inf)
    assert len(history2["loss"]) == 7
    settings3, model3, optimizers3, generator3, _ = make_run(library, optimizer=optimizer, accumulation_steps=2)
    content = library.load_checkpoint(path, model3, optimizers3, generator3)
    assert content["merges"] == [(b"a", b"b")] and content["settings"]["optimizer"] == optimizer
    history3 = library.train(model3, optimizers3, tokens, settings3, content["history"], generator3)
    assert history3["loss"] == history["loss"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model3.parameters()))
    assert os.listdir(tmp_path) == ["run.pt"]


def test_numbers_gone_wrong_stop_the_run(library):
    settings, model, optimizers, generator, _ = make_run(library)
    with torch.no_grad():
        model.token_embedding.weight[:] = math.nan
    before = [p.clone() for p in model.blocks.parameters()]
    with pytest.raises(FloatingPointError, match="step 3: .*not applied.*token_embedding.weight is no longer finite"):
        library.training_step(model, optimizers, torch.randint(300, (100,)), settings, 3, generator, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, model.blocks.parameters()))


def test_generate_stops_and_outgrows_the_context(library, tokenizer):
    config = referees.small_config(library, vocab_size=tokenizer.n_vocab)
    model = referees.scrambled(library, config).float()
    cached, plain = (library.generate(model, tokenizer, "def", 60, temperature=0, use_cache=use) for use in (True, False))
    assert cached == plain and cached[0].startswith("def")
    assert library.generate(model, tokenizer, "x", 20, seed=5, samples=2) == library.generate(model, tokenizer, "x", 20, seed=5, samples=2)
    assert library.generate(model, tokenizer, "a\ud800" + library.END_OF_TEXT * 20, 2)[0].startswith("a")


def test_functions_in(library):
    source = 'class A:\n    def m(self):\n        """First. Second."""\n        def inner(): pass\n        return inner  # gone\n\nasync def f(): pass\n'
    assert list(library.functions_in(source)) == ["def m(self):\n    \"\"\"First.\"\"\"\n\n    def inner():\n        pass\n    return inner", "async def f():\n    pass"]


def own(library, tmp_path, pattern):
    settings = library.make_settings("smoke", corpus=str(pattern), data_dir=str(tmp_path / "data"))
    return library.load_documents(settings)


def test_own_files_of_every_kind(library, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("Hello.\n\nWorld.", encoding="utf-8")
    (folder / "b.jsonl").write_text(json.dumps({"text": "from json"}) + "\n", encoding="utf-8")
    library.datasets.Dataset.from_dict({"text": ["from parquet"]}).to_parquet(str(folder / "c.parquet"))
    assert sorted(own(library, tmp_path, folder)["text"]) == ["Hello.\n\nWorld.", "from json", "from parquet"]
    assert own(library, tmp_path, folder / "*.txt")["text"][:] == ["Hello.\n\nWorld."]


def test_download_is_whole_or_nothing(library, tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/text" else 404)
            self.end_headers()
            if self.path == "/text":
                self.wfile.write(b"once upon a time")
        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert library.download(url + "/text", tmp_path / "data" / "t.txt").read_bytes() == b"once upon a time"
        with pytest.raises(ConnectionError, match="can't be reached"):
            library.download(url + "/missing", tmp_path / "data" / "u.txt")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ConnectionError, match="corpus='python' needs no network"):
        library.download(url + "/text", tmp_path / "data" / "v.txt", timeout=2)
    assert os.listdir(tmp_path / "data") == ["t.txt"]


def test_hub_layout(library, tmp_path):
    folder = tmp_path / "TinyStories" / "data"
    folder.mkdir(parents=True)
    library.datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    assert [row["text"] for row in library.read_hub(str(tmp_path / "TinyStories"))] == ["one", "two"]
    with pytest.raises(ConnectionError, match="can't be read"):
        list(library.read_hub(str(tmp_path / "nothing here")))


def test_near_copies_go_and_the_first_stays(library):
    long = " ".join(f"word{i}" for i in range(60))
    assert library.novel([long, long + " more", "something quite different from all that went before"], 0.5) == [0, 2]
    assert library.exact_first(["a", "b", "a"]) == [0, 1]


def test_split_depends_on_the_name_alone(library):
    names = [f"module_{i}.py" for i in range(2000)]
    shares = [sum(library.split_name(n, 0.1) == kind for n in names) / 2000 for kind in ("train", "validation", "test")]
    assert abs(shares[0] - 0.8) < 0.04 and abs(shares[1] - 0.1) < 0.03
    assert library.split_name("json/decoder.py", 0.06) == library.split_name("json/decoder.py", 0.06)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 20))
@hypothesis_settings(max_examples=80, deadline=None)
def test_windows_start_at_documents(library, lengths, context):
    tokens = torch.tensor([0] + [t for n in lengths for t in [1] * n + [0]])
    ends = (tokens == 0).nonzero()[:, 0].tolist()
    starts = library.window_starts(tokens, 0, context).tolist()
    assert starts == sorted(set(starts)) and all(s + context < len(tokens) for s in starts)
    assert set(starts) >= {e for e in ends[:-1] if e + context < len(tokens)}
    for a, b in zip(ends, ends[1:]):                                    # inside a document: every half window, none near its end
        assert all((s - a) % (context // 2) == 0 and s + context // 2 < b for s in starts if a < s < b)
    if starts:
        inputs, targets = library.get_batch(torch.arange(len(tokens)), 64, context, starts=torch.tensor(starts))
        assert set(inputs[:, 0].tolist()) <= set(starts) and torch.equal(targets, inputs + 1)


def test_shared_passages(library):
    training = np.arange(1000)
    assert library.shared_passages([list(range(100, 120)), list(range(119, 100, -1)), list(range(100, 119)), [5, 5] + list(range(300, 330))], training).tolist() \
        == [True, False, False, True]


def test_scorers(library):
    assert library.parses("def f():\n    pass") and not library.parses("def f(") and not library.parses("x\x00") and not library.parses("[" * 10**5)
    assert library.wilson_interval(8, 10)[0] == pytest.approx(0.490, abs=0.001)
    tokens = torch.tensor([9, 1, 2, 9, 3, 9])
    class Encoding:
        def decode_bytes(self, ids):
            return b"xx" * len(ids)
    low, high = library.bootstrap_interval(torch.ones(5), tokens, 9, Encoding())
    assert 3 / 4 / math.log(2) - 1e-9 <= low <= high <= 2 / 2 / math.log(2) + 1e-9


def test_alone_losses_equal_single_documents(library):
    model = referees.scrambled(library, referees.small_config(library)).float()
    tokens = torch.tensor([49, 1, 2, 3, 49, 4, 5, 49])
    expected = torch.cat([library.cross_entropy(model(part[None, :-1])[0], part[None, 1:], reduction="none")[0] for part in (tokens[:5], tokens[4:])])
    assert torch.allclose(library.alone_losses(model, tokens, 49), expected, atol=1e-5)


def test_the_time_line_accounts_for_the_work(library):
    settings, model, optimizers, generator, _ = make_run(library, optimizer="muon")
    tokens = torch.randint(300, (500,))
    step = lambda: library.training_step(model, optimizers, tokens, settings, 0, generator, torch.float32)
    step()
    work, spans = library.time_line(step)
    assert set(work) == set(library.KINDS) and all(work.values())
    pieces = sorted(piece for kind in work.values() for piece in kind)
    assert all(a + duration <= b + 1e-3 for (a, duration), (b, _) in zip(pieces, pieces[1:])), "leaves don't overlap"
    assert len(spans["optimisers"]) >= 1 and len(spans["backward"]) >= 1
    assert max(end for _, end in spans["backward"]) <= max(end for _, end in spans["optimisers"])


def test_memory_is_kept_or_the_answer_is_no(library, monkeypatch):
    assert library.keep_freed_memory() in (True, False)

    class NoLibrary:
        def __init__(self, name):
            raise TypeError("as on Windows")
    monkeypatch.setattr(library.ctypes, "CDLL", NoLibrary)
    assert library.keep_freed_memory() is False


def test_the_benchmark_prints_one_object_a_row():
    command = [sys.executable, str(ROOT / "tests/benchmarks.py"), "--seeds", "1", "--json"]
    done = subprocess.run([*command, "--rows", "6,7"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["row"] for row in rows] == [6, 7]
    for row in rows:
        assert {"what", "value", "unit", "peer", "ratio", "spread"} <= set(row) and row["value"] > 0 and row["peer"] is None
    wrong = subprocess.run([*command, "--rows", "6,99"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "row 99 is unknown; the rows are 1 to 10, memory, compile and gpu" in wrong.stderr


def test_no_name_is_defined_twice():
    names = []
    for source in define_cells():
        for node in ast.parse(source).body:
            names += [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
    assert len(names) > 100 and sorted(names) == sorted(set(names))
    functions = [node.name for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
                 for node in ast.parse("".join(cell["source"])).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert sorted(functions) == sorted(set(functions)), "a cell defines again what another cell defined"

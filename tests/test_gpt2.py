"""The notebook's GPT is GPT-2: against transformers and against NumPy, both ways; malformed files are refused."""
import dataclasses
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers, from tests/requirements.txt")
import safetensors.numpy
from safetensors.torch import load_file, save_file

from conftest import ROOT

SHAPES = [dict(vocab_size=61, n_positions=72, n_embd=32, n_layer=2, n_head=4), dict(vocab_size=97, n_positions=80, n_embd=64, n_layer=3, n_head=1),
          dict(vocab_size=50, n_positions=96, n_embd=24, n_layer=1, n_head=3)]


def scaled_up(shape, seed=0):
    """A random GPT-2 whose weights are so large that the wrong GELU, epsilon or mask would show."""
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.4 if p.ndim > 1 else 0.3) + (1.0 if "ln_" in name and name.endswith("weight") else 0.0))
    return model


def save(model, folder, layout):
    model.save_pretrained(folder)
    if layout == "published":                       # no prefix, the masks still in it, as in OpenAI's files on the hub
        config = model.config
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        for layer in range(config.n_layer):
            tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(config.n_positions, config.n_positions)).view(1, 1, config.n_positions, config.n_positions)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def close(a, b, share=1e-4):
    return float((a - b).abs().max() / b.abs().max()) < share


def numpy_gpt2(folder, tokens):
    """GPT-2's forward pass in NumPy, from a file read by the library safetensors: the second reader. tokens: (T,) → logits (T, V)."""
    weights = {name.removeprefix("transformer."): tensor.astype(np.float64) for name, tensor in safetensors.numpy.load_file(folder / "model.safetensors").items()}
    heads = json.loads((folder / "config.json").read_text())["n_head"]

    def norm(x, name):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weights[name + ".weight"] + weights[name + ".bias"]

    def linear(x, name):
        return x @ weights[name + ".weight"] + weights[name + ".bias"]

    x = weights["wte.weight"][tokens] + weights["wpe.weight"][:len(tokens)]
    layer = 0
    while f"h.{layer}.ln_1.weight" in weights:
        q, k, v = (part.reshape(len(tokens), heads, -1).transpose(1, 0, 2) for part in np.split(linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn"), 3, -1))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(tokens), -1)
        x = x + linear(mixed, f"h.{layer}.attn.c_proj")
        wide = linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        x = x + linear(0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))), f"h.{layer}.mlp.c_proj")
        layer += 1
    return norm(x, "ln_f") @ weights["wte.weight"].T


@pytest.mark.parametrize("layout", ["transformers", "published"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_logits_loss_and_text(library, tmp_path, shape, layout):
    peer = scaled_up(shape)
    ours = library.load_gpt2(save(peer, tmp_path, layout))
    tokens = torch.randint(shape["vocab_size"], (3, shape["n_positions"]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = peer(tokens, labels=tokens)
        logits, loss = ours(tokens[:, :-1], tokens[:, 1:])
    assert close(logits, theirs.logits[:, :-1]) and abs(float(loss) / float(theirs.loss) - 1) < 1e-4
    written = torch.stack(list(library.stream_tokens(ours, tokens[:1, :4], 64, temperature=0)), 1)
    greedy = peer.generate(tokens[:1, :4], attention_mask=torch.ones(1, 4, dtype=torch.int64), do_sample=False, min_new_tokens=64, max_new_tokens=64,
                           pad_token_id=0, eos_token_id=None)
    assert written.shape == (1, 64) and torch.equal(written, greedy[:, 4:])


@pytest.mark.parametrize("change", [dict(activation="gelu"), dict(activation="relu_squared"), "epsilon", "mask"], ids=str)
def test_the_comparison_would_notice_a_wrong_detail(library, tmp_path, monkeypatch, change):
    peer = scaled_up(SHAPES[0])
    if change == "epsilon":                                        # shows where a vector is small: a model with small embeddings
        with torch.no_grad():
            peer.transformer.wte.weight.mul_(0.02)
            peer.transformer.wpe.weight.mul_(0.02)
    ours = library.load_gpt2(save(peer, tmp_path, "transformers"))
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert close(ours(tokens)[0], peer(tokens).logits)
        if change == "epsilon":
            for part in ours.modules():
                if isinstance(part, library.LayerNorm):
                    part.eps = 1e-6
            other = ours
        elif change == "mask":
            right = library.attention_weights
            monkeypatch.setattr(library, "attention_weights", lambda q, k, mask=None, scale=None: right(q, k, None, scale))
            other = ours
        else:
            other = library.GPT(dataclasses.replace(ours.config, **change)).eval()
            other.load_state_dict(ours.state_dict())
        assert not close(other(tokens)[0], peer(tokens).logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ours_is_read_by_others(library, tmp_path, shape):
    torch.manual_seed(3)
    model = library.GPT(library.GPTConfig(shape["vocab_size"], shape["n_positions"], shape["n_layer"], shape["n_head"], shape["n_embd"])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    library.save_gpt2(model, tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(shape["vocab_size"], (2, shape["n_positions"]))
    with torch.no_grad():
        ours = model(tokens)[0]
        assert close(ours, peer(tokens).logits)
        assert close(ours[0].double(), torch.from_numpy(numpy_gpt2(tmp_path, tokens[0].numpy())))
        assert torch.equal(library.load_gpt2(tmp_path / "model.safetensors")(tokens)[0], ours)


def test_only_gpt2s_choices_can_be_exported(library, tmp_path):
    with pytest.raises(ValueError, match="norm is 'rmsnorm', but GPT-2 has 'layernorm'"):
        library.save_gpt2(library.GPT(library.GPTConfig(50, 16, 1, 1, 16, norm="rmsnorm")), tmp_path)
    assert not list(tmp_path.iterdir())


def written(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape, start, end, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


BAD = {  # header, data, length of the header if it lies, words of the refusal
    "empty": (b"", b"", 5, "header should be"), "a length beyond the file": (b"{}", b"", 2**60, "header should be"), "no JSON": (b"{", b"", None, "not the JSON"),
    "a list": (b"[1]", b"", None, "not the JSON"), "deep": (b"[" * 50_000, b"", None, "not the JSON"), "no text": (b"\xff\xfe{}", b"", None, "not the JSON"),
    "a type that isn't": ({"a": entry([1], 0, 4, "F128")}, bytes(4), None, "unknown type 'F128'"), "a type that is a list": ({"a": entry([1], 0, 4, [])}, bytes(4), None, "unknown type"),
    "a negative size": ({"a": entry([-1], 0, 4)}, bytes(4), None, "whole numbers"), "a shape that doesn't fit": ({"a": entry([3], 0, 4)}, bytes(4), None, "does not fit"),
    "a place outside": ({"a": entry([4], 0, 16)}, bytes(4), None, "does not fit"), "an overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), None, "overlap"),
    "a hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), None, "hole"), "bytes left over": ({"a": entry([1], 0, 4)}, bytes(12), None, "follow the header"),
    "huge": ({"a": entry([2**40], 0, 2**42)}, bytes(4), None, "does not fit"), "places that are text": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}, bytes(4), None, "whole numbers"),
    "a place too many": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, bytes(4), None, "one beginning and one end"),
    "a shape that is none": ({"a": entry(None, 0, 4)}, bytes(4), None, "whole numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_refused_in_one_sentence(library, tmp_path, name):
    header, data, length, words = BAD[name]
    path = written(tmp_path / "model.safetensors", header, data, length)
    for read in (library.safetensors_header, library.read_safetensors, library.load_gpt2):
        with pytest.raises(ValueError, match=words) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_a_damaged_header_never_gives_another_error(library, tmp_path):
    """Every byte of a good header changed, one at a time, to some others: read, or refused with ValueError."""
    good = written(tmp_path / "good", {"a": entry([2, 3], 0, 24), "b": entry([4], 24, 40)}, bytes(40)).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in range(len(good) - 40):
        for byte in (0, 255, int(rng.integers(256)), good[place] ^ 1):
            (tmp_path / "bad").write_bytes(good[:place] + bytes([byte]) + good[place + 1:])
            try:
                library.read_safetensors(tmp_path / "bad")
            except ValueError:
                refused += 1
    assert refused > 2 * (len(good) - 40)


def test_a_bad_header_takes_no_memory(library, tmp_path, monkeypatch):
    """A file with a tensor that does not fit the architecture is refused before any tensor is made."""
    save(scaled_up(SHAPES[0]), tmp_path, "transformers")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    real = library.GPT

    def only_shapes(config):
        model = real(config)
        assert all(p.is_meta for p in model.parameters()), "weights were allocated"
        return model
    monkeypatch.setattr(library, "GPT", only_shapes)
    monkeypatch.setattr(library, "read_safetensors", lambda *a: pytest.fail("the tensors were read"))
    with pytest.raises(ValueError, match=r"'h.1.mlp.c_fc.weight' is torch.float32 of shape \(3, 3\), but it must be real numbers of shape \(32, 128\)"):
        library.load_gpt2(tmp_path)


def test_missing_unknown_and_misshapen_tensors_are_refused(library, tmp_path):
    save(scaled_up(SHAPES[0]), tmp_path, "transformers")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for change, words in ((lambda t: t.pop("transformer.h.1.ln_2.bias"), "lacks the tensor 'h.1.ln_2.bias'"),
                          (lambda t: t.update({"transformer.h.0.extra": torch.zeros(2)}), "unknown tensor 'h.0.extra'"),
                          (lambda t: t.update({"transformer.ln_f.weight": torch.ones(5)}), r"'ln_f.weight' is torch.float32 of shape \(5,\)"),
                          (lambda t: t.update({"transformer.ln_f.weight": torch.ones(32, dtype=torch.int64)}), "'ln_f.weight' is torch.int64"),
                          (lambda t: t.update({"transformer.h.1000000000.ln_1.weight": torch.ones(32)}), "lacks the tensor"),
                          (lambda t: t.pop("transformer.wpe.weight"), "no GPT-2")):
        changed = dict(tensors)
        change(changed)
        save_file(changed, path)
        with pytest.raises(ValueError, match=words):
            library.load_gpt2(tmp_path)
    save_file(tensors, path)
    for text, words in (("[1]", "not the JSON object"), ("{", "not the JSON object"), ('{"n_head": 5}', "n_embd is 32, but it must be a multiple of n_head, which is 5"),
                        ('{"activation_function": "relu"}', "activation_function is 'relu'"), ('{"layer_norm_epsilon": 0.1}', "layer_norm_epsilon is 0.1")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            library.load_gpt2(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        library.load_gpt2(tmp_path)


def test_the_hub_out_of_reach_is_said_in_one_sentence(library, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="'no-such/model' is no path here, and its config.json can't be fetched") as error:
        library.load_gpt2("no-such/model")
    assert "\n" not in str(error.value)


HUB_CLIENT = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import load_library
library = load_library()
tokens = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    print("LOGITS", json.dumps(library.load_gpt2("gpt2")(tokens)[0][0, -1].tolist()))
"""


@pytest.mark.faults
def test_a_model_comes_from_the_hub_once(tmp_path):
    """A stand-in for the hub on this machine, with the hub's addresses and headers: the published layout is fetched, kept and found again."""
    (tmp_path / "files").mkdir()
    model, asked = scaled_up(SHAPES[0]), []
    save(model, tmp_path / "files", "published")

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self, body=False):
            asked.append((self.command, self.path))
            found = re.fullmatch(r"/gpt2/resolve/main/([\w.]+)", self.path.split("?")[0])
            content = (tmp_path / "files" / found[1]).read_bytes() if found and (tmp_path / "files" / found[1]).exists() else None
            self.send_response(404 if content is None else 200)
            if content is not None:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if body and content is not None:
                self.wfile.write(content)

        def do_GET(self):
            self.do_HEAD(body=True)

        def log_message(self, *words):
            pass

    tokens = torch.randint(SHAPES[0]["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(tokens).logits[0, -1]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", HUB_CLIENT, str(ROOT / "tests"), json.dumps(tokens.tolist())]
    try:
        for fetched in (2, 0):                          # the second time, nothing is asked for
            asked.clear()
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
            assert done.returncode == 0, done.stderr[-2000:]
            assert close(torch.tensor(json.loads(done.stdout.split("LOGITS ")[1])), wanted)
            assert sum(method == "GET" and address.startswith("/gpt2/") for method, address in asked) == fetched, asked
        (tmp_path / "files" / "model.safetensors").unlink()
        shutil.rmtree(tmp_path / "hub")
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert "ConnectionError: 'gpt2' is no path here, and its model.safetensors can't be fetched from the hub" in done.stderr
    finally:
        server.shutdown()


def test_round_trip_of_every_type(library, tmp_path):
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in library.SAFETENSORS_TYPES.values()} | {"empty": torch.zeros(0, 4), "number": torch.tensor(3.0)}
    library.write_safetensors(tmp_path / "x.safetensors", tensors)
    for read in (load_file(tmp_path / "x.safetensors"), library.read_safetensors(tmp_path / "x.safetensors")):
        assert all(torch.equal(tensor, read[name]) and tensor.dtype == read[name].dtype for name, tensor in tensors.items())
    assert list(library.read_safetensors(tmp_path / "x.safetensors", {"number"})) == ["number"]


def test_the_real_gpt2_where_it_can_be_had(library):
    try:
        encoding = library.make_tokenizer(library.make_settings(tokenizer="gpt2"), [])[1]
        model = library.load_gpt2("gpt2")
    except ConnectionError as error:
        pytest.skip(f"needs the hub: {error}")
    text = "In the beginning God created the heaven and the earth. And the earth was without form, and void"
    tokens = torch.tensor([encoding.encode(text)])
    with torch.no_grad():
        assert float(model(tokens[:, :-1], tokens[:, 1:])[1]) < 2.5
    assert re.search(r"\bParis\b", library.generate(model, encoding, "The capital of France is the city of", 5, temperature=0)[0])

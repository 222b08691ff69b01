"""The notebook's GPT is GPT-2: against transformers, both ways; malformed files are refused."""
import itertools, json, os, re

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers, from tests/requirements.txt")
from safetensors.torch import load_file, save_file

SHAPES = [dict(zip(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), sizes)) for sizes in ((61, 72, 32, 2, 4), (97, 80, 64, 3, 1), (50, 96, 24, 1, 3))]


def scaled_up(shape):
    """A random GPT-2 whose weights are so large that the wrong GELU, epsilon or mask would show."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.4 if p.ndim > 1 else 0.3) + (1.0 if "ln_" in name and name.endswith("weight") else 0.0))
    return model


def save(model, folder, layout="transformers"):
    model.save_pretrained(folder)
    if layout == "published":                       # no prefix, the masks still in it, as in OpenAI's files on the hub
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 80, 80).tril() for layer in range(model.config.n_layer)}
        save_file({**tensors, **masks}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def resaved(folder, change):
    """The file of weights, with {name: tensor} changed by a function."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_from_elsewhere_work_or_are_refused_by_name(library, tmp_path):
    """A wrapper's prefix, an output layer written out, and one of its own."""
    peer, tokens = scaled_up(SHAPES[0]), torch.arange(30)[None]
    wanted = library.load_gpt2(save(peer, tmp_path))(tokens)[0]
    resaved(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()})
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        resaved(tmp_path, lambda tensors: {prefix + name.removeprefix("module."): t for name, t in tensors.items()})
        assert torch.equal(library.load_gpt2(tmp_path)(tokens)[0], wanted)
    save(peer, tmp_path)
    resaved(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match="'lm_head.weight' differs from 'wte.weight', but a GPT-2's output layer is its token embedding$"):
        library.load_gpt2(tmp_path)


def close(a, b):
    return float((a - b).abs().max() / b.abs().max()) < 1e-4


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ours_is_read_by_others(library, tmp_path, shape):
    torch.manual_seed(3)
    model = library.GPT(library.GPTConfig(shape["vocab_size"], shape["n_positions"], shape["n_layer"], shape["n_head"], shape["n_embd"])).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    library.save_gpt2(model, tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(shape["vocab_size"], (2, shape["n_positions"]))
    with torch.no_grad():
        assert close(model(tokens)[0], peer(tokens).logits)
        assert torch.equal(library.load_gpt2(str(tmp_path))(tokens)[0], model(tokens)[0])


def test_only_gpt2s_choices_can_be_exported(library, tmp_path):
    with pytest.raises(ValueError, match=r"the model is a GPTConfig\(.*norm='rmsnorm'.*but a GPT-2 of its size is .*norm='layernorm'"):
        library.save_gpt2(library.GPT(library.GPTConfig(50, 16, 1, 1, 16, norm="rmsnorm")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_type_is_read(library, tmp_path):
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in library.SAFETENSORS_TYPES.values()} | {"empty": torch.zeros(0, 4), "number": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = library.read_safetensors(tmp_path / "x.safetensors")
    assert all(torch.equal(tensor, read[name]) and tensor.dtype == read[name].dtype for name, tensor in tensors.items())


def written(path, header, data=bytes(4)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape, start, end, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


BAD = {  # header, words of the refusal
    "no JSON": (b"{", ""), "a list": (b"[1]", ""), "deep": (b"[" * 50_000, "recursion"), "no text": (b"\xff\xfe{}", ""), "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "'shape'"),
    "no place": ({"a": {"dtype": "F32", "shape": [1]}}, "'data_offsets'"), "no dictionary": ({"a": [1]}, ""), "a type that isn't": ({"a": entry([1], 0, 4, "F128")}, "'F128'"),
    "a type that is a list": ({"a": entry([1], 0, 4, [])}, ""), "a negative size": ({"a": entry([-1], 0, 4)}, "'a' can't lie in bytes 0 to 4"), "two of them": ({"a": entry([-1, -1], 0, 4)}, ""),
    "a shape that doesn't fit": ({"a": entry([3], 0, 4)}, "can't lie"), "a place outside": ({"a": entry([2], 0, 8)}, "can't lie"), "a place before": ({"a": entry([1], -4, 0)}, "can't lie"),
    "huge": ({"a": entry([2**40], 0, 2**42)}, "can't lie"), "nothing, huge": ({"a": entry([0, 2**80], 0, 0)}, ""), "places that are text": ({"a": entry([1], "0", "4")}, ""),
    "half a place": ({"a": entry([1], 0, 4.0)}, ""), "a place too many": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, ""), "a shape that is none": ({"a": entry(None, 0, 4)}, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_refused_in_one_sentence(library, tmp_path, name):
    header, words = BAD[name]
    with pytest.raises(ValueError, match=f"model.safetensors is no whole safetensors file: .*{words}") as error:
        library.read_safetensors(written(tmp_path / "model.safetensors", header))
    assert "\n" not in str(error.value)


def test_a_damaged_header_never_gives_another_error(library, tmp_path):
    """Every byte of a good header changed, one at a time, to some others: read, or refused with ValueError."""
    good = written(tmp_path / "good", {"a": entry([2, 3], 0, 24), "b": entry([4], 24, 40)}, bytes(40)).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place, byte in itertools.product(range(len(good) - 40), (0, 255, int(rng.integers(256)), None)):
        (tmp_path / "bad").write_bytes(good[:place] + bytes([good[place] ^ 1 if byte is None else byte]) + good[place + 1:])
        try:
            library.read_safetensors(tmp_path / "bad")
        except ValueError:
            refused += 1
    assert refused > 2 * (len(good) - 40)


@pytest.mark.parametrize("name, tensor, words", [
    ("h.1.ln_2.bias", None, r"is absent, but it must be \[32\]"), ("h.0.extra", torch.zeros(2), r"is \[2\], but it must be absent"), ("wte.weight", None, "is absent"),
    ("ln_f.weight", torch.ones(5), r"is \[5\], but it must be \[32\]"), ("h.1000000000.ln_1.weight", torch.ones(32), r"is \[32\], but it must be absent"),
    ("h.1.mlp.c_fc.weight", torch.ones(128, 32), r"is \[128, 32\], but it must be \[32, 128\]")], ids=str)
def test_missing_unknown_and_misshapen_tensors_are_refused(library, tmp_path, monkeypatch, name, tensor, words):
    save(scaled_up(SHAPES[0]), tmp_path)
    tensors = {**load_file(tmp_path / "model.safetensors"), f"transformer.{name}": tensor}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors")
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a: pytest.fail("a weight was loaded"))
    with pytest.raises(ValueError, match=f"{name!r} {words}"):
        library.load_gpt2(tmp_path)


@pytest.mark.parametrize("text, words", [
    ("[1]", "describes no GPT-2"), ("{", "describes no GPT-2"), ({"n_head": 5}, "n_embd is 32, but it must be a multiple of n_head, which is 5"),
    ({"activation_function": "relu"}, "activation_function is 'relu', but it must be 'gelu_new'"), ({"layer_norm_epsilon": 0.1}, "layer_norm_epsilon is 0.1"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"), ({"n_layer": 10**9}, "n_layer is 1000000000, but it must lie"), ({"n_layer": None}, "n_layer is None")], ids=str)
def test_other_choices_are_refused(library, tmp_path, text, words):
    save(scaled_up(SHAPES[0]), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(text if isinstance(text, str) else json.dumps({**described, **text}))
    with pytest.raises(ValueError, match=words):
        library.load_gpt2(tmp_path)


def test_offline_is_said_in_one_sentence(library, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"'no-such/model' is no folder here, and its config.json can't be fetched from the hub \(OfflineModeIsEnabled\)$"):
        library.load_gpt2("no-such/model")


def test_the_real_gpt2_where_it_can_be_had(library):
    try:
        encoding = library.make_tokenizer(library.make_settings(tokenizer="gpt2"), [])[1]
        model = library.load_gpt2(os.environ.get("GPT2", "gpt2"))
    except OSError as error:
        pytest.skip(f"needs the hub: {error}")
    tokens = torch.tensor([encoding.encode("In the beginning God created the heaven and the earth. And the earth was without form, and void")])
    with torch.no_grad():
        assert float(model(tokens[:, :-1], tokens[:, 1:])[1]) < 2.5
    assert re.search(r"\bParis\b", library.generate(model, encoding, "The capital of France is the city of", 5, temperature=0)[0])

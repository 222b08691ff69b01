"""The notebook's GPT is GPT-2: against transformers; weights from elsewhere load or are refused."""
import json, os, re

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs tests/requirements.txt")
from safetensors.torch import load_file, save_file

NAMES = "vocab_size", "n_positions", "n_embd", "n_layer", "n_head"
SHAPES = [dict(zip(NAMES, sizes)) for sizes in ((61, 72, 32, 2, 4), (97, 80, 64, 3, 1),
                                                (50, 96, 24, 1, 3))]


def scaled_up(shape):
    """A random GPT-2 whose weights are so large that the wrong GELU, epsilon or mask would show."""
    config = transformers.GPT2Config(**shape, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            middle = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            p.copy_(torch.randn_like(p) * (0.4 if p.ndim > 1 else 0.3) + middle)
    return model


def save(model, folder, change=lambda tensors: tensors):
    """Saves as transformers does, with the tensors changed by a function."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {name: t.contiguous() for name, t in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def as_published(tensors):
    """No prefix, and the masks still in it, as in OpenAI's files on the hub."""
    layers = {int(found.group(1)) for name in tensors
              if (found := re.search(r"\.h\.(\d+)\.", name))}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 80, 80).tril() for layer in layers}
    return {name.removeprefix("transformer."): t for name, t in tensors.items()} | masks


def close(a, b):
    return float((a - b).abs().max() / b.abs().max()) < 1e-4


@pytest.mark.parametrize("layout", [dict, as_published], ids=["transformers", "published"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_logits_loss_and_text(library, tmp_path, shape, layout):
    peer = scaled_up(shape)
    ours = library.load_gpt2(save(peer, tmp_path, layout))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape["vocab_size"], (3, shape["n_positions"]), generator=generator)
    with torch.no_grad():
        theirs = peer(tokens, labels=tokens)
        logits, loss = ours(tokens[:, :-1], tokens[:, 1:])
    assert close(logits, theirs.logits[:, :-1])
    assert abs(float(loss) / float(theirs.loss) - 1) < 1e-4
    stream = library.stream_tokens(ours, tokens[:1, :4], 64, temperature=0)
    greedy = peer.generate(tokens[:1, :4], attention_mask=torch.ones(1, 4, dtype=torch.int64),
                           do_sample=False, min_new_tokens=64, max_new_tokens=64, pad_token_id=0,
                           eos_token_id=None)
    assert torch.equal(torch.stack(list(stream), 1), greedy[:, 4:])


def test_weights_from_elsewhere_work(library, tmp_path):
    """A wrapper's prefix, an output layer written out, other types, a padded vocabulary."""
    peer, tokens = scaled_up(SHAPES[0]), torch.arange(30)[None]
    wanted = library.load_gpt2(save(peer, tmp_path))(tokens)[0]
    table = "transformer.wte.weight"
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        save(peer, tmp_path, lambda tensors: {prefix + name: t for name, t in {
            **tensors, "lm_head.weight": tensors[table].clone()}.items()})
        assert torch.equal(library.load_gpt2(tmp_path)(tokens)[0], wanted)
    save(peer, tmp_path, lambda tensors: {
        **tensors, table: torch.cat([tensors[table], torch.randn(3, 32)])})
    assert torch.equal(library.load_gpt2(tmp_path)(tokens)[0], wanted)
    save(peer, tmp_path, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    assert library.load_gpt2(tmp_path)(tokens)[0].dtype == torch.float32


@pytest.mark.parametrize("name, tensor", [
    ("h.1.ln_2.bias", None), ("h.0.extra", torch.zeros(2)), ("wte.weight", None),
    ("ln_f.weight", torch.ones(5)), ("h.9.ln_1.weight", torch.ones(32)),
    ("h.1.mlp.c_fc.weight", torch.ones(128, 32)), ("lm_head.weight", torch.ones(61, 32))], ids=str)
def test_missing_unknown_and_misshapen_tensors_are_refused(library, tmp_path, name, tensor):
    full = name if name.startswith("lm") else f"transformer.{name}"
    save(scaled_up(SHAPES[0]), tmp_path, lambda tensors: {
        n: t for n, t in {**tensors, full: tensor}.items() if t is not None})
    with pytest.raises(ValueError, match="can't be loaded as a GPT-2") as error:
        library.load_gpt2(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    lambda good: good[:-4], lambda good: b"", lambda good: b"\xff" * 8 + good[8:],
    lambda good: (3).to_bytes(8, "little") + b"[1]", lambda good: good[:5],
    lambda good: (50000).to_bytes(8, "little") + b"[" * 50000])
def test_damaged_files_are_refused_in_one_sentence(library, tmp_path, change):
    path = save(scaled_up(SHAPES[0]), tmp_path) / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="can't be loaded as a GPT-2") as error:
        library.load_gpt2(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_header_never_gives_another_error(library, tmp_path):
    path = save(scaled_up(SHAPES[0]), tmp_path) / "model.safetensors"
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(8 + int.from_bytes(good[:8], "little"), size=200):
        path.write_bytes(good[:place] + bytes([rng.integers(256)]) + good[place + 1:])
        try:
            library.load_gpt2(tmp_path)
        except ValueError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("text", [
    "[1]", "{", {"n_head": 5}, {"activation_function": "relu"}, {"layer_norm_epsilon": 0.1},
    {"scale_attn_weights": False}, {"n_layer": None}], ids=str)
def test_other_choices_are_refused(library, tmp_path, text):
    save(scaled_up(SHAPES[0]), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    changed = text if isinstance(text, str) else json.dumps({**described, **text})
    (tmp_path / "config.json").write_text(changed)
    with pytest.raises(ValueError, match="can't be loaded as a GPT-2"):
        library.load_gpt2(tmp_path)


def test_offline_is_said_in_one_sentence(library, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="^no-such/model can't be loaded as a GPT-2") as error:
        library.load_gpt2("no-such/model")
    assert "\n" not in str(error.value)


def test_the_real_gpt2_where_it_can_be_had(library):
    try:
        encoding = library.make_tokenizer(library.make_settings(tokenizer="gpt2"), [])[1]
        model = library.load_gpt2(os.environ.get("GPT2", "gpt2"))
    except (OSError, ValueError) as error:
        pytest.skip(f"needs the hub: {error}")
    tokens = torch.tensor(
        [encoding.encode("In the beginning God created the heaven and the earth.")])
    with torch.no_grad():
        assert float(model(tokens[:, :-1], tokens[:, 1:])[1]) < 2.5

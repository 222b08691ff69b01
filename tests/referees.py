"""Checks of the definitions against independent references: each takes a library, and raises.

test_library.py runs them on the definitions as they are; test_mistakes.py breaks one."""
import math
from functools import partial

import torch
from torch.nn import functional as F


def small_config(lib, **changes):
    values = dict(vocab_size=50, context_length=16, n_layer=2, n_head=2, n_embd=16,
                  position="rotary", norm="rmsnorm",
                  activation="relu_squared", qk_norm=True, bias=False, tie_embeddings=False)
    return lib.GPTConfig(**{**values, **changes})


def small_run(lib, vocab_size=300, device="cpu", precision=torch.float32, **changes):
    """A run of a small model before its first step."""
    small = dict(context_length=16, n_embd=16, max_steps=12, batch_size=2, evaluations=2)
    settings = lib.make_settings("smoke", **{**small, **changes})
    return lib.new_run(settings, lib.make_config(settings, vocab_size), device, precision)


def scrambled(lib, config, seed=0):
    """A model with nothing at zero, in double precision."""
    torch.manual_seed(seed)
    model = lib.GPT(config).double().eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3
    return model


def merges_follow_the_rule(lib):
    # equally frequent: the greater pair
    assert lib.train_bpe(["ab cd"], 258, pattern=r"\S+") == [(b"c", b"d")]
    for text in ("abcd abcd xyxyx", "aaaa aaa banana bandana ananas the theme then",
                 "ab abc abcd bc bcd cd b bcbc"):
        merges, word = lib.train_bpe([text] * 3, 257 + 25, pattern=r"\S+"), text.replace(" ", "")
        assert merges == lib.train_bpe_plainly([word.encode() for word in text.split()] * 3, 25)
        assert lib.build_tokenizer(merges).encode_ordinary(word) == lib.encode_by_hand(word, merges)


def parts_are_pytorchs(lib):
    # the small numbers show where ε stands
    for scale in (1e-3, 3):
        x = scale * (torch.randn(4, 16, dtype=torch.float64) + 0.3)
        for ours, theirs in ((lib.LayerNorm(16), torch.nn.LayerNorm(16)),
                             (lib.RMSNorm(16), torch.nn.RMSNorm(16, 1e-6))):
            assert torch.allclose(ours.double()(x), theirs.double()(x))
        for name, kind in (("gelu", "none"), ("gelu_tanh", "tanh")):
            assert torch.allclose(lib.ACTIVATIONS[name](x), F.gelu(x, approximate=kind))
    dropped = lib.dropout(torch.ones(100_000), 0.25, training=True)
    assert abs((dropped == 0).float().mean() - 0.25) < 0.01
    assert math.isclose(dropped.max(), 4 / 3, rel_tol=1e-6)
    q, k, v = torch.randn(3, 2, 3, 6, 8, dtype=torch.float64)
    for mask in (None, torch.ones(6, 6, dtype=torch.bool).tril()):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.allclose(lib.scaled_dot_product_attention(q, k, v, mask), expected)


def cross_entropy_is_pytorchs(lib):
    logits, targets = torch.randn(7, 30, dtype=torch.float64) * 1000, torch.randint(30, (7,))
    for z in (logits, logits / 1000, logits.bfloat16()):
        for reduction in ("mean", "none"):
            assert torch.allclose(lib.cross_entropy(z, targets, reduction).double(),
                                  F.cross_entropy(z.double(), targets, reduction=reduction))
    assert torch.allclose(lib.softmax(logits), torch.softmax(logits, -1))
    assert torch.autograd.gradcheck(lambda z: lib.cross_entropy(z, targets, "none"),
                                    (logits / 300).requires_grad_())


def positions_are_those_on_paper(lib):
    x, places = torch.randn(2, 5, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 70])
    angles = places[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    rotated = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angles)
    assert torch.allclose(lib.apply_rotary(x, places), torch.cat([rotated.real, rotated.imag], -1),
                          atol=1e-6)
    waves = lib.sinusoidal_positions(71, 8)[places]
    assert torch.allclose(waves, torch.stack([angles.sin(), angles.cos()], -1).flatten(1),
                          atol=1e-5)


# with today's parts; test_gpt2.py compares GPT-2's with those of transformers
def gpt_is_the_one_by_hand(lib):
    model, tokens = scrambled(lib, small_config(lib)), torch.randint(50, (16,))
    norm, p = partial(F.rms_norm, eps=1e-6), dict(model.named_parameters())
    C = [model.config.n_embd]
    x = p["token_embedding.weight"][tokens]
    for i in range(model.config.n_layer):
        w = {name.split(f"blocks.{i}.")[-1].removesuffix(".weight"): value
             for name, value in p.items()}
        read = norm(x, C, w["attention_norm"])
        q, k, v = (F.linear(read, w[f"attention.{part}"]).view(16, 2, -1).transpose(0, 1)
                   for part in ("query", "key", "value"))
        q, k = (lib.apply_rotary(norm(part, part.shape[-1:]), torch.arange(16)) for part in (q, k))
        heads = F.scaled_dot_product_attention(1.2 * q, k, v, is_causal=True)
        x = x + F.linear(heads.transpose(0, 1).flatten(1), w["attention.projection"])
        inner = F.relu(F.linear(norm(x, C, w["feed_forward_norm"]), w["feed_forward.expand"])) ** 2
        x = x + F.linear(inner, w["feed_forward.projection"])
    expected = F.linear(norm(x, C, p["final_norm.weight"]), p["output.weight"])
    logits, loss = model(tokens[None], tokens[None])
    gradients = zip(*(torch.autograd.grad(z, model.parameters())
                      for z in (loss, F.cross_entropy(expected, tokens))))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in [(logits[0], expected), *gradients])


# neither with later tokens, nor where the text comes in pieces, to the cache
def earlier_logits_never_change(lib):
    for position in ("none", "sinusoidal", "learned", "rotary"):
        config = small_config(lib, position=position)
        model, tokens = scrambled(lib, config), torch.randint(50, (2, 16))
        expected, cache = model(tokens)[0], lib.new_cache(config, 2, dtype=torch.float64)
        changed = torch.cat([tokens[:, :9], (tokens[:, 9:] + 1) % 50], 1)
        assert torch.equal(expected[:, :9], model(changed)[0][:, :9])
        pieces = [model(part, cache=cache)[0] for part in tokens.split([3, 4, *[1] * 9], 1)]
        assert torch.allclose(torch.cat(pieces, 1), expected)


# two batches of three, averaged, do what PyTorch's optimisers do with one of six
def steps_are_pytorchs(lib):
    # Muon iterates in bfloat16
    for optimizer, tolerance in (("adamw", 1e-6), ("muon", 0.02)):
        settings = lib.make_settings("smoke", optimizer=optimizer, context_length=8, batch_size=3,
                                     accumulation_steps=2, max_steps=5,
                                     warmup_steps=1, learning_rate=0.02, max_grad_norm=0.05,
                                     weight_decay=0.5)
        model, twin = (scrambled(lib, small_config(lib, norm="layernorm", bias=True))
                       for _ in range(2))
        tokens = torch.randint(50, (99,))
        run = lib.Run(model, lib.make_optimizers(model, settings, torch.bfloat16),
                      torch.Generator().manual_seed(0),
                      settings, torch.float32, lib.new_history(), model)
        vectors, matrices = ([p for p in part.parameters() if p.ndim == n]
                             for part, n in ((twin, 1), (twin.blocks, 2)))
        tables = [twin.token_embedding.weight, twin.output.weight]
        adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95))
        both = [adamw(matrices + tables, weight_decay=0.5), adamw(vectors, weight_decay=0)]
        if optimizer == "muon":
            both = [torch.optim.Muon(matrices, weight_decay=0.5),
                    adamw(vectors + tables, weight_decay=0)]
        two = torch.Generator().manual_seed(0)
        for step, rate in enumerate((0.5, 1.0, 1.0, 2 / 3, 1 / 3)):
            loss, norm, fraction = lib.training_step(run, tokens)
            run.history["loss"].append(loss)
            twin.zero_grad()
            batches = [lib.get_batch(tokens, 3, 8, generator=two) for _ in range(2)]
            (expected := twin(*map(torch.cat, zip(*batches)))[1]).backward()
            their_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
            for theirs in both:
                theirs.param_groups[0]["lr"] = 0.02 * rate
                theirs.step()
            assert abs(loss - expected) < tolerance > abs(norm - their_norm)
            assert math.isclose(fraction, rate)
            assert all(torch.allclose(a, b, 0, tolerance / 10)
                       for a, b in zip(model.parameters(), twin.parameters()))


def filters_keep_the_right_tokens(lib):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for kept, options in ((2, dict(top_k=2)), (2, dict(min_p=0.4)), (1, dict(top_p=0.5)),
                          (2, dict(top_p=0.6)), (4, dict(top_p=1))):
        found = lib.filter_logits(logits, **options) > -math.inf
        assert found.tolist() == [i < kept for i in range(4)]
    assert torch.allclose(lib.filter_logits(logits, temperature=0.5), logits * 2)


# each token is scored in the first window that holds it
def losses_are_those_of_their_windows(lib):
    model = scrambled(lib, small_config(lib))
    for length, stride in ((5, None), (17, None), (18, None), (60, None), (41, 16), (40, 5)):
        tokens, expected = torch.randint(50, (length,)), []
        last = length - 1 - (context := min(16, length - 1))
        for start in sorted({*range(0, last, stride or context // 2), last}):
            window = tokens[start:start + context + 1]
            losses = F.cross_entropy(model(window[None, :-1])[0][0], window[1:], reduction="none")
            expected += losses[len(expected) - start:].tolist()
        found = lib.per_token_losses(model, tokens, stride=stride)
        assert torch.allclose(found, torch.tensor(expected), atol=1e-5)
        scores = lib.evaluate(model, tokens, 77, stride=stride)
        assert math.isclose(scores["bits_per_byte"], sum(expected) * math.log2(math.e) / 77,
                            rel_tol=1e-5)


REFERENCES = [merges_follow_the_rule, parts_are_pytorchs, cross_entropy_is_pytorchs,
              positions_are_those_on_paper, gpt_is_the_one_by_hand, earlier_logits_never_change,
              steps_are_pytorchs,
              filters_keep_the_right_tokens, losses_are_those_of_their_windows]

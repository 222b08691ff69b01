"""Checks of the contract's names against independent references. Each takes a library and raises AssertionError.

test_library.py runs them on the notebook's definitions; test_mutations.py breaks a definition and expects one to fail.
"""
import math

import torch


def small_config(lib, **changes):
    values = dict(vocab_size=50, context_length=16, n_layer=2, n_head=2, n_embd=16, position="rotary", norm="rmsnorm",
                  activation="relu_squared", qk_norm=True, bias=False, tie_embeddings=False)
    return lib.GPTConfig(**{**values, **changes})


def scrambled(lib, config, seed=0):
    """A model with nothing at zero, in double precision."""
    torch.manual_seed(seed)
    model = lib.GPT(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


def gradient_is_right(function, x):
    """Against finite differences, in double precision."""
    assert torch.autograd.gradcheck(function, x.double().requires_grad_())


def merges_follow_the_rule(lib):
    # 'ab' and 'cd' are equally frequent: the greater pair goes first; then 'aba' overlaps are counted as they stand
    merges = lib.train_bpe(["abcd abcd xyxyx"], 257 + 3, pattern=r"\S+")
    assert merges == lib.train_bpe_plainly([b"abcd", b"abcd", b"xyxyx"], 3)
    assert lib.train_bpe(["ab cd"], 258, pattern=r"\S+") == [(b"c", b"d")]
    text = ["aaaa aaa aa banana bandana ananas", "the theme then there"] * 3
    words = [w.encode() for t in text for w in t.split()]
    assert lib.train_bpe(text, 257 + 25, pattern=r"\S+") == lib.train_bpe_plainly(words, 25)


def targets_are_shifted(lib):
    inputs, targets = lib.get_batch(torch.arange(100), 8, 10)
    assert torch.equal(targets, inputs + 1)


def attention_is_pytorchs(lib):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 8, dtype=torch.float64) for _ in range(3))
    for mask in (None, torch.ones(6, 6, dtype=torch.bool).tril()):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.allclose(lib.scaled_dot_product_attention(q, k, v, mask), expected)


def the_future_stays_hidden(lib):
    for position in ("none", "sinusoidal", "learned", "rotary"):
        model = scrambled(lib, small_config(lib, position=position))
        tokens = torch.randint(50, (2, 16))
        changed = tokens.clone()
        changed[:, 9:] = (changed[:, 9:] + 1) % 50
        assert torch.equal(model(tokens)[0][:, :9], model(changed)[0][:, :9])
        assert not torch.equal(model(tokens)[0][:, 9:], model(changed)[0][:, 9:])


def cache_equals_full_pass(lib):
    for position in ("none", "sinusoidal", "learned", "rotary"):
        config = small_config(lib, position=position, value_embedding=True)
        model = scrambled(lib, config)
        tokens = torch.randint(50, (2, 16))
        cache = lib.KeyValueCache(config, 2, dtype=torch.float64)
        parts = [model(part, cache=cache)[0] for part in (tokens[:, :3], tokens[:, 3:7], *tokens[:, 7:].split(1, 1))]
        assert torch.allclose(torch.cat(parts, 1), model(tokens)[0])


def cross_entropy_is_pytorchs(lib):
    logits, targets = torch.randn(7, 30) * 1000, torch.randint(30, (7,))
    assert torch.allclose(lib.cross_entropy(logits, targets), torch.nn.functional.cross_entropy(logits, targets))
    wide, answers = torch.randn(900, 1000), torch.randint(1000, (900,))            # more than one slice
    gradients = []
    for function in (lib.cross_entropy, torch.nn.functional.cross_entropy):
        leaf = wide.clone().requires_grad_()
        function(leaf, answers).backward()
        gradients.append(leaf.grad)
    assert torch.allclose(lib.cross_entropy(wide, answers), torch.nn.functional.cross_entropy(wide, answers))
    assert torch.allclose(*gradients, atol=1e-8)
    gradient_is_right(lambda z: lib.cross_entropy(z, torch.tensor([0, 4, 5]), reduction="none"), torch.randn(3, 6) * 3)


def norms_are_pytorchs(lib):
    x = torch.randn(4, 16) * 3 + 2
    for ours, theirs in ((lib.LayerNorm(16), torch.nn.LayerNorm(16)), (lib.RMSNorm(16), torch.nn.RMSNorm(16, eps=1e-6))):
        assert torch.allclose(ours(x), theirs(x), atol=1e-6)
        gradient_is_right(ours.double(), x)


def gelu_is_pytorchs(lib):
    x = torch.linspace(-5, 5, 101)
    for kind in ("none", "tanh"):
        assert torch.allclose(lib.gelu(x, kind), torch.nn.functional.gelu(x, approximate=kind), atol=1e-6)
        gradient_is_right(lambda x: lib.gelu(x, kind), x)
    gradient_is_right(lib.relu_squared, x + 0.01)


def optimizer_difference(ours, theirs, steps=60):
    torch.manual_seed(0)
    start = [torch.randn(8, 12), torch.randn(12, 8)]
    pair = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    optimizers = [ours(pair[0]), theirs(pair[1])]
    for _ in range(steps):
        for a, b in zip(*pair):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return float(torch.stack([(a - b).detach().abs().max() / b.detach().abs().max() for a, b in zip(*pair)]).max())      # NaN where one is


def adamw_is_pytorchs(lib):
    options = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
    assert optimizer_difference(lambda p: lib.AdamW(p, **options), lambda p: torch.optim.AdamW(p, **options)) < 1e-5


def muon_is_pytorchs(lib):
    options = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    assert optimizer_difference(lambda p: lib.Muon(p, **options), lambda p: torch.optim.Muon(p, **options)) < 0.02


def rotary_sees_distances(lib):
    torch.manual_seed(0)
    q, k = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    def product(i, j):
        return float(lib.apply_rotary(q, torch.tensor([i])) @ lib.apply_rotary(k, torch.tensor([j])).T)
    assert math.isclose(product(5, 2), product(45, 42), rel_tol=1e-5) and not math.isclose(product(5, 2), product(5, 3))
    assert torch.allclose(lib.apply_rotary(q, torch.tensor([7])).norm(), q.norm())
    gradient_is_right(lambda x: lib.apply_rotary(x, torch.arange(3)), torch.randn(2, 3, 8))


def clipping_is_pytorchs(lib):
    for largest in (0.5, 100.0):
        p, twin = (torch.nn.Parameter(torch.zeros(5)) for _ in range(2))
        p.grad, twin.grad = torch.arange(5.0), torch.arange(5.0)
        assert torch.allclose(lib.clip_grad_norm([p], largest), torch.nn.utils.clip_grad_norm_([twin], largest))
        assert torch.allclose(p.grad, twin.grad)


def draws_fall_as_the_probabilities_say(lib):
    scores = torch.tensor([2.0, 1.0, 0.0, -math.inf])
    drawn = lib.draw(scores.expand(50_000, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 50_000
    assert shares[3] == 0 and (shares - torch.softmax(scores, -1)).abs().max() < 0.01


def filters_keep_the_right_tokens(lib):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    def kept(**options):
        return (lib.filter_logits(logits, **options) > -math.inf).tolist()
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_p=0.5) == [True, False, False, False] and kept(top_p=0.6) == [True, True, False, False]
    assert kept(min_p=0.4) == [True, True, False, False]
    assert torch.allclose(lib.filter_logits(logits, temperature=0.5), logits * 2)


REFEREES = [merges_follow_the_rule, targets_are_shifted, attention_is_pytorchs, the_future_stays_hidden, cache_equals_full_pass,
            cross_entropy_is_pytorchs, norms_are_pytorchs, gelu_is_pytorchs, adamw_is_pytorchs, muon_is_pytorchs,
            rotary_sees_distances, clipping_is_pytorchs, filters_keep_the_right_tokens, draws_fall_as_the_probabilities_say]

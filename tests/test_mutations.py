"""A definition that is broken on purpose must be noticed by its referee."""
import pytest

import referees
from conftest import load_library

MUTATIONS = {
    "unshifted targets": ("windows[:, 1:].to(device)", "windows[:, :-1].to(device)", "targets_are_shifted"),
    "leaky mask": ("device=tokens.device) <= positions[:, None]", "device=tokens.device) <= positions[:, None] + 1", "the_future_stays_hidden"),
    "no 1/√d": ("(1 / math.sqrt(q.shape[-1]) if scale is None else scale)", "(1 if scale is None else scale)", "attention_is_pytorchs"),
    "mask upside down": ("masked_fill_(~mask, -math.inf)", "masked_fill_(mask, -math.inf)", "attention_is_pytorchs"),
    "wrong tie rule": ("return token.translate(INVERTED_BYTES).decode", "return token.decode", "merges_follow_the_rule"),
    "stale pair counts": ("counts[old] -= weight", "counts[old] -= 0", "merges_follow_the_rule"),
    "rotation the wrong way for one half": ("first * sin + second * cos], -1)", "second * cos - first * sin], -1)", "rotary_sees_distances"),
    "cache forgets its length": ("cache.length += T", "cache.length += 0", "cache_equals_full_pass"),
    "unstable cross-entropy": ("torch.exp(logits - largest).sum(-1)) + largest[..., 0]", "torch.exp(logits).sum(-1))", "cross_entropy_is_pytorchs"),
    "no bias correction": ("value=-lr / (1 - beta1 ** state[\"step\"]))", "value=-lr)", "adamw_is_pytorchs"),
    "coupled weight decay": ("p.mul_(1 - lr * group[\"weight_decay\"])", "p.mul_(1 - group[\"weight_decay\"])", "adamw_is_pytorchs"),
    "Muon without look-ahead": ("p.grad.lerp(momentum, group[\"momentum\"])", "momentum.clone()", "muon_is_pytorchs"),
    "GELU with the wrong constant": ("0.044715", "0.44715", "gelu_is_pytorchs"),
    "norm without epsilon's place": ("centred = x - x.mean(-1, keepdim=True)", "centred = x", "norms_are_pytorchs"),
    "clipping that never clips": ("(max_norm / (norm + 1e-6)).clamp(max=1.0)", "torch.tensor(1.0)", "clipping_is_pytorchs"),
    "top-p that keeps one too few": ("cut = probabilities.cumsum(-1) - probabilities >= top_p", "cut = probabilities.cumsum(-1) > top_p + 1e-6", "filters_keep_the_right_tokens"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_definition_is_noticed(name):
    old, new, referee = MUTATIONS[name]
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        getattr(referees, referee)(load_library([(old, new)]))

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
    "cross-entropy without the largest score": ("part.amax(-1) - part.gather", "0 - part.gather", "cross_entropy_is_pytorchs"),
    "slices of cross-entropy that overlap": ("gradient[i * rows:(i + 1) * rows] =", "gradient[:len(p)] =", "cross_entropy_is_pytorchs"),
    "no bias correction": ("[-lr / (1 - beta1 ** s[\"step\"]) for s in states]", "[-lr for s in states]", "adamw_is_pytorchs"),
    "coupled weight decay": ("1 - lr * group[\"weight_decay\"]", "1 - group[\"weight_decay\"]", "adamw_is_pytorchs"),
    "Muon without look-ahead": ("torch._foreach_lerp(gradients, momenta, group[\"momentum\"])", "[m.clone() for m in momenta]", "muon_is_pytorchs"),
    "GELU with the wrong constant": ("(1 + 0.044715 * square)) - 1", "(1 + 0.44715 * square)) - 1", "gelu_is_pytorchs"),
    "GELU's slope without its bell": ("torch.addcmul(y, x, slope, out=slope)", "slope.copy_(y)", "gelu_is_pytorchs"),
    "norm's gradient without the mean": ("gradient -= upstream.mean(-1, keepdim=True)", "pass", "norms_are_pytorchs"),
    "norm's gradient without what lies along": ("value=-1 / normal.shape[-1]", "value=0.0", "norms_are_pytorchs"),
    "rotation's gradient not turned back": ("turn(upstream, cos, -sin)", "turn(upstream, cos, sin)", "rotary_sees_distances"),
    "clipping that never clips": ("(max_norm / (norm + 1e-6)).clamp(max=1.0)", "torch.tensor(1.0)", "clipping_is_pytorchs"),
    "a draw with noise of the wrong shape": (".log_().neg_().log_().neg_()", ".log_()", "draws_fall_as_the_probabilities_say"),
    "top-p that keeps one too few": ("cut = probabilities.cumsum(-1) - probabilities >= top_p", "cut = probabilities.cumsum(-1) > top_p + 1e-6", "filters_keep_the_right_tokens"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_definition_is_noticed(name):
    old, new, referee = MUTATIONS[name]
    broken = load_library([(old, new)])             # fails here, loudly, where the definition reads otherwise by now
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        getattr(referees, referee)(broken)

"""A definition that is broken on purpose must be noticed by its check in referees.py."""
import pytest

import referees
from conftest import load_library

MUTATIONS = {  # check: (text in the define cells, what takes its place), …
    "merges_follow_the_rule": [
        ("-byte for byte", "byte for byte"), ("byte in token), 1", "byte in token), -300"),
        ("counts[neighbours] -= frequency[index]", "pass"), ("if joined in neighbours:", "if False:"), ("if -count != counts[pair]:", "if False:"),
        ("(counts[pair], pair))", "counts[pair])"), ("merge_pair(tokens, min(known", "merge_pair(tokens, max(known")],
    "parts_are_pytorchs": [
        ("scores = q / math.sqrt(q.shape[-1]) @", "scores = q @"), ("masked_fill_(~mask,", "masked_fill_(mask,"),
        ("(x - x.mean(-1, keepdim=True)", "(x"), ("keepdim=True) + eps)", "keepdim=True)) + eps"),
        ("erf(x / math.sqrt(2))", "erf(x)"), ("0.044715", "0.44715"), ("x.device) / (1 - fraction)", "x.device)")],
    "cross_entropy_is_pytorchs": [
        ("torch.log_softmax(logits, -1)  #", "logits  #"), ("torch.exp(x - x.amax(dim, keepdim=True))", "x.exp()"),
        ("logits.to(torch.promote_types(logits.dtype, torch.float32))", "logits")],
    "positions_are_those_on_paper": [("first * sin + second * cos]", "first * sin - second * cos]"),
                                     ("angles.sin(), angles.cos()]", "angles.cos(), angles.sin()]")],
    "gpt_is_the_one_by_hand": [
        ("x = x + self.attention(", "x = self.attention("), ("torch.cat([first, x[:, :-1]], 1)", "x"), ("math.sqrt(1.2) * rms_normalise(", "rms_normalise("),
        ("permute(2, 0, 3, 1, 4)", "flip(3).permute(2, 0, 3, 1, 4)"), ("torch.relu(x).square()", "torch.relu(x)")],
    "earlier_logits_never_change": [
        (") <= positions[:, None]", ") <= positions[:, None] + 1"), ("torch.arange(past, past + T,", "torch.arange(T,"),
        ("self.length, self.length + k.shape[-2]", "self.length, k.shape[-2]"), ("self.last, x[:, -1:]", "self.last, self.last")],
    "steps_are_pytorchs": [
        ("targets)[1] / settings.accumulation_steps", "targets)[1]"), ("optimizer.zero_grad()", "pass"),
        (".clamp(max=1.0)", ".clamp(min=1.0)"), ('setdefault("peak", group["lr"]) * fraction', 'get("lr") * fraction'),
        ("warm = (step + 1)", "warm = step"), ("left = (max_steps -", "left = (9 -"), ("1 - lr * group[", "1 - group["),
        ('state["mean"] / (1 - beta1 ** state["step"])', 'state["mean"]'), ("max(1, rows / columns) ** 0.5", "1"),
        ("if p.ndim < 2], weight_decay=0", "if p.ndim < 2], weight_decay=0.5"), ('1 - group["lr"] * group[', "1 - group["),
        ('p.grad.lerp(momentum, group["momentum"])', "momentum.clone()")],
    "filters_keep_the_right_tokens": [("p.cumsum(-1) - p >= top_p", "p.cumsum(-1) > top_p + 1e-6"),
                                      ("+ math.log(min_p)", "+ min_p"), ("[0][..., -1:]", "[0][..., :1]")],
    "losses_are_those_of_their_windows": [("row[done - start:]", "row[:start + context - done]"),
                                          ("/ math.log(2) / text_bytes}", "/ text_bytes}")]}


@pytest.mark.parametrize("check, old, new", [(check, *texts) for check in MUTATIONS for texts in MUTATIONS[check]])
def test_a_broken_definition_is_noticed(check, old, new):
    broken = load_library([(old, new)])             # fails here, loudly, where the definition reads otherwise by now
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        getattr(referees, check)(broken)

"""Mistakes planted in the notebook's definitions: a cell of the section and a referee must notice.
"""
import pytest

import referees
from conftest import code_cells, load_library, run_cells

# (text in the define cells, what takes its place, the section whose cells must notice or 0,
# the function of referees.py that must notice or None)
MISTAKES = [
    ("counts[neighbours] += frequency[index]", "counts[neighbours] += 1", 2, None),
    ("counts[neighbours] -= frequency[index]", "pass", 0, "merges_follow_the_rule"),
    ("if -count != counts[pair]:", "if False:", 0, "merges_follow_the_rule"),
    ("(counts[pair], pair))", "counts[pair])", 2, "merges_follow_the_rule"),
    ("earliest = min(known", "earliest = max(known", 2, "merges_follow_the_rule"),
    ("for byte in token] + [1]", "for byte in token] + [-300]", 0, "merges_follow_the_rule"),
    ("return windows[:, :-1], windows[:, 1:]", "return windows[:, 1:], windows[:, :-1]", 3, None),
    ("np.flatnonzero(side == name)", "np.flatnonzero(side != name)", 3, None),
    ("torch.arange(len(tokens) - context_length)", "torch.arange(len(tokens) - context_length - 1)",
     3, None),
    ("range(start, max(start + 1,", "range(start + 1, max(start + 2,", 3, None),
    ("y = x @ self.weight.T", "y = x @ self.weight", 4, None),
    ("is None else y + self.bias.to(y.dtype)", "is None else y", 4, None),
    ("0.55 / math.sqrt(in_features)", "0.55 / math.sqrt(out_features)", 4, None),
    ("return self.weight[tokens]", "return self.weight[tokens - 1]", 4, None),
    ("(kept.to(x.dtype) / (1 - fraction))", "kept.to(x.dtype)", 4, "parts_are_pytorchs"),
    ("(x * x).mean(-1", "(x * x).mean(-2", 4, "parts_are_pytorchs"),
    ("(x - x.mean(-1, keepdim=True)", "(x", 4, "parts_are_pytorchs"),
    ("erf(x / math.sqrt(2))", "erf(x)", 4, "parts_are_pytorchs"),
    ("0.044715", "0.44715", 4, "parts_are_pytorchs"),
    ("powers / powers.sum(dim", "powers / powers.sum(0", 4, "cross_entropy_is_pytorchs"),
    ("torch.log_softmax(logits, -1)  #", "softmax(logits).log()  #", 4,
     "cross_entropy_is_pytorchs"),
    ("torch.exp(x - x.amax(dim, keepdim=True))", "x.exp()", 4, "cross_entropy_is_pytorchs"),
    ("losses.mean() if", "losses.sum() if", 4, "cross_entropy_is_pytorchs"),
    ("scores = q / math.sqrt(q.shape[-1]) @", "scores = q @", 5, "parts_are_pytorchs"),
    ("masked_fill(~mask, -math.inf)", "masked_fill(mask, -math.inf)", 5, "parts_are_pytorchs"),
    ("for head in self.heads], -1)", "for head in self.heads[::-1]], -1)", 5, None),
    ("math.sqrt(1.2) * rms_normalise(q)", "rms_normalise(q)", 5, "gpt_is_the_one_by_hand"),
    ("dtype=torch.bool, device=x.device).tril()", "dtype=torch.bool, device=x.device).triu()", 5,
     None),
    ("angles.sin(), angles.cos()]", "angles.cos(), angles.sin()]", 6,
     "positions_are_those_on_paper"),
    ("first * sin + second * cos]", "first * sin - second * cos]", 6,
     "positions_are_those_on_paper"),
    ("device=positions.device) / head_dim)", "device=positions.device) / 2 / head_dim)", 6,
     "positions_are_those_on_paper"),
    ("x = x + self.attention(", "x = self.attention(", 7, "gpt_is_the_one_by_hand"),
    ("mask = positions[:, None] >=", "mask = positions[:, None] + 1 >=", 7,
     "earlier_logits_never_change"),
    ("positions = torch.arange(past, end,", "positions = torch.arange(0, end - past,", 0,
     "earlier_logits_never_change"),
    ("self.output(self.final_norm(x))", "self.output(x)", 7, "gpt_is_the_one_by_hand"),
    ("model.output.weight.zero_()", "pass", 7, None),
    ("block = 12 * C * C", "block = 10 * C * C", 7, None),
    ("ends = probabilities.cumsum(-1)", "ends = probabilities.clone()", 7, None),
    ("torch.relu(x).square()", "torch.relu(x)", 4, "gpt_is_the_one_by_hand"),
    ("optimizer.zero_grad()", "pass", 8, "steps_are_pytorchs"),
    ("targets)[1] / settings.accumulation_steps", "targets)[1]", 8, "steps_are_pytorchs"),
    (".clamp(max=1.0)", ".clamp(min=1.0)", 8, "steps_are_pytorchs"),
    ('memory["mean"] / (1 - beta1 ** memory["step"])', 'memory["mean"]', 8, "steps_are_pytorchs"),
    ("return p.grad.lerp(momentum, beta)", "return momentum.clone()", 8, "steps_are_pytorchs"),
    ("warm = (step + 1)", "warm = step", 8, "steps_are_pytorchs"),
    ("left = (max_steps -", "left = (9 -", 8, "steps_are_pytorchs"),
    ("max(1, rows / columns) ** 0.5", "1", 8, "steps_are_pytorchs"),
    ('p.mul_(1 - group["lr"] * group["weight_decay"])\n        p.sub_', "p.sub_", 8,
     "steps_are_pytorchs"),
    ("dict(params=vectors, weight_decay=0.0)", "dict(params=vectors, weight_decay=0.5)", 8,
     "steps_are_pytorchs"),
    ("row[done - start:]", "row[:start + context - done]", 8, "losses_are_those_of_their_windows"),
    ("/ math.log(2) / text_bytes}", "/ text_bytes}", 8, "losses_are_those_of_their_windows"),
    ("peak * fraction", "peak", 8, "steps_are_pytorchs"),
    ("max(seen.get(token, 0) - self.discount, 0)", "seen.get(token, 0)", 9, None),
    ("-np.log2(rows)", "-np.log(rows)", 9, None),
    (".sum(1) / math.log(2) / sizes", ".sum(1) / sizes", 9, None),
    ("nats, sizes = np.bincount(index, nats), np.bincount(index, sizes)", "pass", 9, None),
    ("p.cumsum(-1) - p >= top_p", "p.cumsum(-1) > top_p + 1e-6", 10,
     "filters_keep_the_right_tokens"),
    ("+ math.log(min_p)", "+ min_p", 10, "filters_keep_the_right_tokens"),
    ("[0][..., -1:]  # the k-th", "[0][..., :1]  # the k-th", 10, "filters_keep_the_right_tokens"),
    ("logits = logits.float() / temperature\n", "logits = logits.float()\n", 0,
     "filters_keep_the_right_tokens"),
    ("end = self.length + k.shape[2]", "end = self.length + 1", 0, "earlier_logits_never_change"),
]


@pytest.mark.parametrize("old, new, check", [
    (old, new, check) for old, new, _, check in MISTAKES if check])
def test_a_referee_notices(old, new, check):
    broken = load_library([(old, new)])     # fails here where the text reads otherwise by now
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError)):
        getattr(referees, check)(broken)


def cells_to_run(wanted):
    """[(is it of the wanted section, source)]: all definitions, what comes before, the section."""
    rows = []
    for section, cell in code_cells():
        tags, source = cell["metadata"].get("tags", []), "".join(cell["source"])
        before = section == 7 and wanted > 7 and ("untrained_model = " in source
                                                  or "overfitted = " in source)
        if "define" in tags:
            rows.insert(sum(is_define for is_define, *_ in rows), (True, section, source))
        elif before or section == wanted and (
                section < 8 or "check" in tags and "(model" not in source):
            rows.append((False, section, source))
    return [(section == wanted, source) for _, section, source in rows]


def what_notices(space, wanted, old, new):
    """What the cells of a section raise with this mistake in them; None where they run through."""
    space = dict(space)
    for here, source in cells_to_run(wanted):
        try:
            exec(compile(source.replace(old, new) if here else source, "cell", "exec"), space)
        except KeyboardInterrupt:
            raise
        except BaseException as error:      # tiktoken's PanicException is no Exception
            return error


@pytest.mark.long
def test_a_cell_of_the_same_section_notices(tmp_path, monkeypatch):
    """In the namespace after sections 0 to 3, on little text; without a mistake, the cells pass."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_PRESET", "smoke")
    space = run_cells(0, 3, "preset = 'smoke'\nchanges = dict(corpus_megabytes=0.3, "
                            "vocab_size=320, held_out_fraction=0.2)")
    definitions = ("run", "check", "exercise", "solution")  # what is left out
    run_cells(4, 4, without=definitions, space=space)
    run_cells(5, 5, space=space)
    run_cells(6, 16, without=definitions, space=space)
    sections = sorted({section for _, _, section, _ in MISTAKES if section})
    for section in sections:
        assert what_notices(space, section, "no such text", "") is None, section
    unnoticed = [(section, old) for old, new, section, _ in MISTAKES
                 if section and what_notices(space, section, old, new) is None]
    assert not unnoticed

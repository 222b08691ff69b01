"""Mistakes of the kind that students make, planted in the notebook's cells: a cell of the same section must notice."""

import pytest
import torch

from conftest import code_cells

MISTAKES = {  # section: (text of a cell, what takes its place), …
    3: [("counts[neighbours] += frequency[index]", "counts[neighbours] += 1"), ("min(known, key=lambda pair: ids[pair[0] + pair[1]])", "known[0]"),
        ("single_bytes + [first + second", "[first + second")],
    4: [("return windows[:, :-1], windows[:, 1:]", "return windows[:, 1:], windows[:, :-1]"), ("np.flatnonzero(side == name)", "np.flatnonzero(side != name)"),
        ("torch.randint(len(tokens) - context_length, (", "torch.randint(len(tokens) - context_length - 1, ("),
        ("range(a, max(a + 1, b - step), step)", "range(a + 1, max(a + 2, b - step), step)"), ("result[place] = texts", "result[origin] = texts")],
    5: [("y = x @ self.weight.T", "y = x @ self.weight"), ("is None else y + self.bias.to(y.dtype)", "is None else y"),
        ("return self.weight[tokens]", "return self.weight[tokens - 1]"), ("x.device) / (1 - fraction)", "x.device)"), ("numbers < 2.0**16", "numbers > 2.0**16"),
        ("(x * x).mean(-1", "(x * x).mean(-2"), ("(x - x.mean(-1, keepdim=True)", "(x"), ("erf(x / math.sqrt(2))", "erf(x)"),
        ("powers / powers.sum(dim", "powers / powers.sum(0"), ("losses = -log_probabilities", "losses = log_probabilities"), ("losses.mean() if", "losses.sum() if")],
    6: [("scores = q / math.sqrt(q.shape[-1]) @", "scores = q @"), ("masked_fill_(~mask", "masked_fill_(mask"),
        ("torch.cat([head(x) for head in self.heads], -1)", "torch.cat([head(x) for head in self.heads[::-1]], -1)"),
        ("T, 3, self.n_head, C // self.n_head)\n        qkv = qkv.permute(2, 0, 3, 1, 4)", "T, self.n_head, 3, C // self.n_head)\n        qkv = qkv.permute(3, 0, 2, 1, 4)"),
        ("dtype=torch.bool, device=x.device).tril()", "dtype=torch.bool, device=x.device).triu()")],
    7: [("angles.sin(), angles.cos()]", "angles.cos(), angles.sin()]"), ("first * sin + second * cos]", "first * sin - second * cos]"),
        ("device=positions.device) / head_dim)", "device=positions.device) / 2 / head_dim)")],
    8: [("x = x + self.attention(", "x = self.attention("), (") <= positions[:, None]", ") <= positions[:, None] + 1"),
        ("x = self.final_norm(x)\n", ""), ("model.output.weight.zero_()", "pass"), ("L * (12 * C * C", "L * (10 * C * C"),
        ("ends = p.cumsum(-1)", "ends = p.clone()")],
    9: [("optimizer.zero_grad()", "pass"), ("targets)[1] / settings.accumulation_steps", "targets)[1]"), (".clamp(max=1.0)", ".clamp(min=1.0)"),
        ('state["mean"] / (1 - beta1 ** state["step"])', 'state["mean"]'), ("p.grad.lerp(momentum", "p.grad.lerp(p.grad"),
        ("warm = (step + 1)", "warm = step"), ("row[done - start:]", "row[:start + context - done]"), ("/ math.log(2) / text_bytes}", "/ text_bytes}"),
        ("if p.ndim < 2], weight_decay=0)]\n    adamw", "if p.ndim < 2], weight_decay=0.5)]\n    adamw")],
    10: [("max(seen.get(token, 0) - self.discount, 0)", "seen.get(token, 0)"), ("p *= self.discount * len(seen)\n            p = (", "p = ("),
         ("sizes[chosen].sum(1), [2.5", "sizes.sum(), [2.5"), (".sum(1) / math.log(2) / sizes", ".sum(1) / sizes")]}


def what_notices(space, wanted, old, new):
    """What the cells of a section raise with this mistake in them; None where they run through."""
    space = dict(space)
    cells = [(section, cell["metadata"].get("tags", []), "".join(cell["source"])) for section, cell in code_cells()]
    assert sum(source.count(old) for section, _, source in cells if section == wanted) == 1, f"{old!r} must stand once in section {wanted}"
    cells = [cell for cell in cells if "define" in cell[1]] + [cell for cell in cells if "define" not in cell[1]]
    for section, tags, source in cells:
        if section == wanted:
            source = source.replace(old, new)
        if wanted == 9 and "step_seconds = timing_run" in source:
            break
        before = section == 8 and (wanted > 8 and "= settings, stamp" in source or wanted == 9 and "overfitted = " in source)
        if "define" in tags or before or section == wanted and section > 4 and "display" not in source and "need(sections_run, settings, 9)" not in source \
                or section == wanted and "check" in tags or section == wanted == 4 and "split_tables = " in source:
            try:
                exec(compile(source, "cell", "exec"), space)
            except BaseException as error:      # tiktoken's PanicException is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                return error
        if wanted == 10 and "bootstrap's interval" in source:
            break


@pytest.mark.long
def test_mistakes_are_noticed_in_their_section(tmp_path, monkeypatch):
    """In the namespace after sections 0 to 4, on little text; without a mistake, the cells pass."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "run"}
    for section, cell in code_cells():
        tags, source = cell["metadata"].get("tags", []), "".join(cell["source"])
        if "parameters" in tags:
            source = 'preset, changes = "smoke", dict(corpus_megabytes=0.3, held_out_fraction=0.2, vocab_size=320)'
        if section <= 4 or "define" in tags:
            exec(compile(source, "cell", "exec"), space)
    space["causal"] = torch.ones(6, 6, dtype=torch.bool).tril()      # what section 6 leaves
    for section, ((text, _), *_) in MISTAKES.items():
        assert what_notices(space, section, text, text) is None, section
    unnoticed = {(section, old) for section in MISTAKES for old, new in MISTAKES[section] if what_notices(space, section, old, new) is None}
    assert unnoticed == {(10, "sizes[chosen].sum(1), [2.5")}     # an interval that is nearly the same

"""The exercises: solutions pass, untouched stubs say so, and typical mistakes are named."""
import ast
import contextlib
import io
import json
import re

import pytest

from conftest import NOTEBOOK, cells_with_tag, load_library

WRONG = {  # exercise: [(a typical wrong answer, what its check must say)]
    "compression_ratio": [("return len(tokenizer.encode_ordinary(text)) / len(text.encode())", "tokens per byte"),
                        ("return len(text) / len(tokenizer.encode_ordinary(text))", "counts characters"),
                        ("len(text)", "returns nothing")],
    "decode_tokens": [("return ''.join(vocabulary[i].decode() for i in ids)", "join all bytes first"),
                      ("return ''.join(vocabulary[i].decode(errors='replace') for i in ids)", "join all bytes first"),
                      ("return b''.join(vocabulary[i] for i in ids)", "must return text"),
                      ("return b''.join(vocabulary[i] for i in ids).decode()", "errors='replace'")],
    "input_and_target": [("x = tokens[start:start + length]; return x, x", "shift the target"),
                         ("return tokens[start:start + length], tokens[start - 1:start + length - 1]", "shift the other way"),
                         ("return tokens[start:length], tokens[start + 1:length + 1]", "of length 4"),
                         ("return tokens[start:start + length]", "two tensors")],
    "to_bits_per_byte": [("return nats_per_token * tokens / text_bytes", "divide by math.log(2)"),
                         ("return nats_per_token / math.log(2)", "bits per token"),
                         ("return nats_per_token / math.log(2) * text_bytes / tokens", "fewer bits per byte"),
                         ("return nats_per_token * math.log(2) * tokens / text_bytes", "wrong side")],
    "log_softmax": [("return torch.softmax(z, -1)", "softmax itself"), ("return (z.exp() / z.exp().sum(-1, keepdim=True)).log()", "overflow"),
                    ("return z - z.exp().sum(0, keepdim=True).log()", "over the rows"), ("return torch.softmax(z, -1).log()", "overflow")],
    "softmax_backward": [("return p * upstream", "second half"), ("return p * (1 - p) * upstream", "diagonal"),
                         ("return p * (upstream - (p * upstream).sum())", "all rows together")],
    "sliding_mask": [("return torch.ones(length, length, dtype=torch.bool).tril()", "whole causal mask"),
                     ("return torch.ones(length, length).tril()", "tensor of bool"),
                     ("d = torch.arange(length)[:, None] - torch.arange(length); return d.abs() < window", "look ahead"),
                     ("d = torch.arange(length)[:, None] - torch.arange(length); return (d >= 0) & (d <= window)", "one too wide"),
                     ("d = torch.arange(length)[:, None] - torch.arange(length); return (d > 0) & (d < window)", "look at itself")],
    "attention_by_loops": [("return scaled_dot_product_attention(q, k, v)", "looks ahead"),
                           ("m = torch.ones(len(q), len(q), dtype=torch.bool).tril(); return softmax((q @ k.T).masked_fill(~m, -math.inf)) @ v", "√d"),
                           ("return torch.exp(q @ k.T / math.sqrt(q.shape[1])).tril() @ v", "sum to 1")],
    "distance_bias": [("p = torch.arange(length); return slopes[:, None, None] * (p[:, None] - p)", "score lower"),
                      ("p = torch.arange(length); return -slopes[:, None, None] * (p[:, None] - p + 1).clamp(min=0)", "itself must be 0"),
                      ("p = torch.arange(length); return -slopes.flip(0)[:, None, None] * (p[:, None] - p)", "exchanged")],
    "cache_bytes": [("return config.n_layer * config.n_embd * tokens * bytes_per_number", "keys alone"),
                    ("return 2 * config.n_embd * tokens * bytes_per_number", "one layer"),
                    ("return 2 * config.n_layer * config.n_head * config.n_embd * tokens * bytes_per_number", "share the width"),
                    ("return 2 * config.n_layer * config.n_embd * config.context_length * bytes_per_number", "seen so far"),
                    ("return 2 * config.n_layer * config.n_embd * tokens", "count of numbers")],
    "gpt2_parameters": [("return parameter_formula(GPTConfig(vocab_size, context_length, n_layer, 1, n_embd, tie_embeddings=False))", "output layer"),
                        ("return parameter_formula(GPTConfig(vocab_size, context_length, n_layer, 1, n_embd, position='none'))", "table of positions"),
                        ("return parameter_formula(GPTConfig(vocab_size, context_length, n_layer, 1, n_embd, bias=False))", "biases"),
                        ("return parameter_formula(GPTConfig(vocab_size, context_length, n_layer, 1, n_embd)) - 2 * n_embd", "LayerNorm"),
                        ("return 124439808", "for GPT-2 small alone")],
    "cosine_rate": [("return 0.5 * (1 + math.cos(math.pi * step / max_steps))", "no warm-up"),
                    ("return min(step / warmup_steps, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup_steps) / (max_steps - warmup_steps))))", "step 0 is 0"),
                    ("return min((step + 1) / (warmup_steps + 1), (max_steps - step) / (max_steps - warmup_steps))", "straight line"),
                    ("return min((step + 1) / (warmup_steps + 1), math.cos(math.pi / 4 * max(0, step - warmup_steps) / (max_steps - warmup_steps)))", "near 0")],
    "lion_step": [("d = torch.sign(0.9 * momentum + 0.1 * gradient); return weight * (1 - rate * decay) + rate * d, 0.99 * momentum + 0.01 * gradient", "up the hill"),
                  ("d = torch.sign(0.9 * momentum + 0.1 * gradient); return weight - rate * d, 0.99 * momentum + 0.01 * gradient", "weight decay"),
                  ("return weight * (1 - rate * decay) - rate * torch.sign(gradient), 0.99 * momentum + 0.01 * gradient", "gradient alone"),
                  ("d = 0.9 * momentum + 0.1 * gradient; return weight * (1 - rate * decay) - rate * d, 0.99 * momentum + 0.01 * gradient", "sign is missing"),
                  ("d = torch.sign(0.9 * momentum + 0.1 * gradient); return weight * (1 - rate * decay) - rate * d, 0.9 * momentum + 0.1 * gradient", "0.99"),
                  ("d = torch.sign(0.9 * momentum + 0.1 * gradient); weight.mul_(1 - rate * decay).sub_(rate * d); return weight, 0.99 * momentum + 0.01 * gradient",
                   "changes its arguments")],
    "perplexity_of": [("return len(probabilities) / sum(probabilities)", "mean of the probabilities"),
                      ("return sum(1 / p for p in probabilities) / len(probabilities)", "mean of 1 / p"),
                      ("return math.exp(-sum(map(math.log, probabilities)))", "take their mean"),
                      ("return -sum(map(math.log, probabilities)) / len(probabilities)", "exponential"),
                      ("return math.exp(sum(map(math.log, probabilities)) / len(probabilities))", "sign is missing"),
                      ("return float(np.prod(probabilities) ** (-1 / len(probabilities)))", "underflows")],
    "repetition_penalty": [("s = scores.clone(); s[list(set(written))] /= penalty; return s", "larger"),
                           ("s = scores.clone()\n    for t in written:\n        s[t] = s[t] / penalty if s[t] > 0 else s[t] * penalty\n    return s", "punished once"),
                           ("for t in set(written):\n        scores[t] = scores[t] / penalty if scores[t] > 0 else scores[t] * penalty\n    return scores", "changes its argument")],
    "beam_search": [("text = []\n    for _ in range(length):\n        p = next_log_probabilities(text)\n        text = text + [p.index(max(p))]\n    return text", "likeliest token at each step"),
                    ("best = max(itertools.product(range(len(next_log_probabilities([]))), repeat=length), key=lambda t: sum(next_log_probabilities(list(t[:i]))[t[i]] "
                     "for i in range(length)))\n    return list(best)", "greedy")],
    "induction_weight": [("last, found = {}, []\n    for i, t in enumerate(tokens):\n        if t in last:\n            found.append(float(weights[i, last[t]]))\n        last[t] = i\n"
                          "    return sum(found) / len(found) if found else 0.0", "earlier use itself"),
                         ("last, found = {}, []\n    for i, t in enumerate(tokens):\n        if t in last:\n            found.append(float(weights[i, last[t] + 1]))\n        last[t] = i\n"
                          "    return sum(found) / len(tokens)", "divides by all tokens"),
                         ("last, found = {}, []\n    for i, t in enumerate(tokens):\n        if t in last:\n            found.append(float(weights[i, last[t] + 1]))\n        last[t] = i\n"
                          "    return sum(found)", "mean")],
}


@pytest.fixture(scope="module")
def space():
    return load_library().__dict__


def stubs():
    """{name: (source of the definition, source of its cell)}"""
    found = {}
    for source in cells_with_tag("exercise"):
        (definition,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        found[definition.name] = (ast.get_source_segment(source, definition), source)
    return found


def verdict(space, name, answer):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        space["check_exercise"](answer, space[f"check_{name}"])
    return out.getvalue().endswith(": right\n"), out.getvalue()


def with_body(space, name, body):
    """The stub with another body."""
    head = stubs()[name][0].split('"""')[0]
    own = dict(space)
    exec(head + body.strip(), own)
    return own[name]


def test_there_are_enough_exercises_in_three_levels():
    prose = "\n".join("".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown")
    levels = re.findall(r"^\*\*(★+) ", prose, re.M)
    assert len(levels) == len(stubs()) >= 12 and set(levels) == {"★", "★★", "★★★"} and set(WRONG) == set(stubs())


@pytest.mark.parametrize("name", WRONG)
def test_an_untouched_stub_says_so_in_one_line(space, name):
    own = dict(space)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(stubs()[name][1], own)
    assert out.getvalue() == f"not done yet: {name}\n"


@pytest.mark.parametrize("name", WRONG)
def test_the_solution_passes(space, name):
    own = dict(space)
    with contextlib.redirect_stdout(io.StringIO()):
        for source in cells_with_tag("solution"):
            exec(source, own)
    right, words = verdict(space, name, own[f"{name}_solution"])
    assert right and words == f"{name}_solution: right\n"


@pytest.mark.parametrize("name, body, words", [(name, *case) for name, cases in WRONG.items() for case in cases])
def test_a_typical_mistake_is_named(space, name, body, words):
    right, said = verdict(space, name, with_body(space, name, body))
    assert not right and words in said and said.count("\n") == 1, said


@pytest.mark.parametrize("name", WRONG)
def test_code_that_breaks_is_reported_without_a_traceback(space, name):
    right, said = verdict(space, name, with_body(space, name, "return undefined_name"))
    assert not right and "NameError" in said

"""The exercises: solutions pass, untouched stubs say so, and typical mistakes are named."""
import ast
import contextlib
import io
import json
import re

import pytest

from conftest import NOTEBOOK, cells_with_tag, code_cells

FORMULA = "return parameter_formula(GPTConfig(vocab_size, context_length, n_layer, 1, n_embd"
COSINE, MIX = "0.5 + 0.5 * math.cos(math.pi *", "torch.sign(0.9 * momentum + 0.1 * gradient)"
WRONG = {  # [(what its check must say, a wrong answer), or (…, part of the solution, its edit)]
    "compression_ratio": [
        ("tokens per byte", "return len(tokenizer.encode_ordinary(text)) / len(text.encode())"),
        ("counts characters", "text.encode()", "text"), ("returns nothing", "return ", ""),
        ("must return float", " / ", " // "),
        ("counts words", "return len(text.encode()) / len(text.split())")],
    "decode_tokens": [("Join all bytes", "return ''.join(vocabulary[i].decode() for i in ids)"),
        ("Join all bytes", "return ''.join(vocabulary[i].decode(errors='replace') for i in ids)"),
        ("must return str", '.decode(errors="replace")', ""), ("errors=", 'errors="replace"', ""),
        ("str() shows", "return ''.join(str(vocabulary[i]) for i in ids)"),
        ("no character", "return ''.join(map(chr, ids))")],
    "input_and_target": [
        ("shift the target", "start + 1:start + length + 1", "start:start + length"),
        ("shift the other way", "start + 1:start + length + 1", "start - 1:start + length - 1"),
        ("tensor (1,)", "return tokens[start:length], tokens[start + 1:length + 1]"),
        ("must return tuple", "return tokens[start:start + length]"),
        ("tensor (3,)", "start + 1:start + length + 1", "start + 1:start + length")],
    "to_bits_per_byte": [("divide by math.log(2)", " / math.log(2)", ""),
        ("bits per token", "return nats_per_token / math.log(2)"),
        ("fewer bits per byte", "return nats_per_token / math.log(2) * text_bytes / tokens"),
        ("wrong side", "/ math.log(2)", "* math.log(2)"),
        ("eight bits", "/ text_bytes", "/ (8 * text_bytes)")],
    "log_softmax": [("softmax itself", "return torch.softmax(z, -1)"),
        ("overflow", "return torch.softmax(z, -1).log()"),
        ("overflow", "z = z - z.amax(-1, keepdim=True)", "pass"),
        ("not the rows", "z - z.exp().sum(-1", "z - z.exp().sum(0"),
        ("both rows together", "z.exp().sum(-1, keepdim=True)", "z.exp().sum()")],
    "softmax_backward": [("second half", "return p * upstream"),
        ("diagonal", "return p * (1 - p) * upstream"), ("all rows", "-1, keepdim=True", ""),
        ("turned round", "return p", "return -p"), ("cross-entropy", "return p - upstream")],
    "sliding_mask": [
        ("whole causal mask", "return torch.ones(length, length, dtype=torch.bool).tril()"),
        ("of bool", "return torch.ones(length, length).tril()"),
        ("look ahead", "(distance >= 0) & (distance", "(distance.abs()"),
        ("one too wide", "< window", "<= window"), ("look at itself", ">= 0", "> 0")],
    "attention_by_loops": [("looks ahead", "return scaled_dot_product_attention(q, k, v)"),
        ("√d, here", " / len(q[i])**0.5", ""), ("sum to 1", " / sum(powers)", ""),
        ("not by d", "**0.5", ""), ("number of tokens", "len(q[i])", "len(q)"),
        ("sees itself", "range(i + 1)", "range(i)")],
    "distance_bias": [("returns nothing", "return ", ""), ("lower score", "-slopes", "slopes"),
        ("exchanged", "-slopes", "-slopes.flip(0)"),
        ("itself must be 0", "[:, None] - torch", "[:, None] + 1 - torch"),
        ("tensor (2, 4, 4)", "slopes[:, None, None]", "slopes[0]")],
    "cache_bytes": [("keys alone", "2 * ", ""), ("one layer", "config.n_layer * ", ""),
        ("share the width", "n_embd", "n_embd * config.n_head"),
        ("these tokens alone", "tokens", "config.context_length"),
        ("count", " * bytes_per_number", "")],
    "gpt2_parameters": [("output layer", FORMULA + ", tie_embeddings=False))"),
        ("table of positions", FORMULA + ", position='none'))"),
        ("biases", FORMULA + ", bias=False))"), ("LayerNorm", FORMULA + ")) - 2 * n_embd"),
        ("LayerNorm", "norm = 2 * n_embd", "norm = n_embd"), ("GPT-2 small", "return 124439808")],
    "cosine_rate": [("no warm-up", "step < warmup_steps", "False"),
        ("step 0 is 0", "(step + 1) / (warmup_steps + 1)", "step / warmup_steps"),
        ("straight line", COSINE, "1 - ("), ("returns nothing", "return ", ""),
        ("step 4 should be near 0.45", "(warmup_steps + 1)", "warmup_steps"),
        ("near 0", COSINE, "math.cos(math.pi / 4 *")],
    "lion_step": [("uphill", "- rate * direction", "+ rate * direction"),
        ("Weight decay is missing", "* (1 - rate * decay)", ""),
        ("gradient alone", MIX, "torch.sign(gradient)"), ("sign is missing", "torch.sign", ""),
        ("momentum alone", MIX, "torch.sign(momentum)"),
        ("sign of the new", MIX, "torch.sign(0.99 * momentum + 0.01 * gradient)"),
        ("mixes from the new", MIX, "torch.sign(0.9 * (0.99 * momentum + 0.01 * gradient)"
                                    " + 0.1 * gradient)"),
        ("0.99", "0.99 * momentum + 0.01", "0.9 * momentum + 0.1"),
        ("changes its arguments", "weight * (1 - rate", "weight.mul_(1 - rate")],
    "perplexity_of": [
        ("mean of the probabilities", "return len(probabilities) / sum(probabilities)"),
        ("mean of 1 / p", "return sum(1 / p for p in probabilities) / len(probabilities)"),
        ("take their mean", " / len(probabilities)", ""), ("exponential", "math.exp", ""),
        ("sign is missing", "-sum", "sum"),
        ("underflows", "return math.prod(probabilities) ** (-1 / len(probabilities))")],
    "repetition_penalty": [
        ("is larger", "penalty if logits[token] < 0 else 1 / penalty", "1 / penalty"),
        ("punished once", "set(written)", "written"), ("changes its argument", ".clone()", ""),
        ("subtracts", "*= penalty if logits[token] < 0 else 1 / penalty", "-= penalty"),
        ("not written", "return torch.where(logits < 0, logits * penalty, logits / penalty)")],
    "beam_search": [("greedy", "[:width]", ""), ("logarithms", "total + p", "p"),
        ("likeliest token", "[:width]", "[:1]"), ("must return list", "beams[0][1]", "beams[0]"),
        ("all extensions", "[:width]", "[:width if not beams[0][1] else None]")],
    "induction_weight": [("first occurrence", "last[token] = i", "last.setdefault(token, i)"),
        ("itself", "] + 1]", "]]"), ("divides by all tokens", "/ len(found)", "/ len(tokens)"),
        ("the mean", " / len(found)", ""), ("occurred before", " if found else 0.0", "")],
}


def functions(tag):
    """{name: source} of the functions in the cells with this tag."""
    return {node.name.removesuffix("_solution"): ast.get_source_segment(source, node)
            for source in cells_with_tag(tag) for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef)}


def test_there_are_enough_exercises_in_three_levels(library):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    levels = {name: stars for stars, name in re.findall(r"^- (★+) `(\w+)`", prose, re.M)}
    assert list(levels) == list(functions("exercise")) == list(WRONG) == library.EXERCISES
    assert set(levels.values()) == {"★", "★★", "★★★"}


@pytest.mark.parametrize("name, words, answer", [
    (n, w, a) for n in WRONG for w, *a in [*WRONG[n],
                                           ("It stopped with NameError", "return undefined_name")]])
def test_a_typical_mistake_is_named(library, name, words, answer):
    """What the check says of a stub with a body, or of the solution with an edit."""
    own, body = dict(vars(library)), functions("solution")[name].split("\n", 1)[1].strip()
    assert len(answer) == 1 or answer[0] in body
    exec(functions("exercise")[name].split('"""')[0]
         + (body.replace(*answer) if answer[1:] else answer[0]), own)
    said = library.check_exercise(own[name])
    assert said.startswith("not right yet.") and words in said and "\n" not in said, said


def test_one_cell_checks_everything_and_the_solutions_pass(library):
    space, sources = dict(vars(library)), ["".join(c["source"]) for _, c in code_cells()]
    cells = [s for s in sources if "check_exercise(globals()" in s and "def " not in s]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for source in [*cells_with_tag("exercise"), *cells_with_tag("solution")[:-1], *cells * 2]:
            exec(source, space)
    unsolved = [f"{name:19} not done yet" for name in WRONG]
    assert out.getvalue().splitlines() == 2 * (unsolved + [f"all {len(WRONG)} solutions are right"])

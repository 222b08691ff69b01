"""The panels without a browser: what their widgets hold after each action. test_browser.py sees them in JupyterLab."""
import re
import threading
import time

import pytest
import torch

import referees


@pytest.fixture(scope="module")
def tokenizer(library):
    return library.build_tokenizer(library.train_bpe(["def f(x):\n    return x + 1", "naïve 東京"] * 3, 300))


@pytest.fixture
def model(library, tokenizer):
    return referees.scrambled(library, referees.small_config(library, vocab_size=tokenizer.n_vocab, context_length=64)).float()


@pytest.fixture
def panel(library, model, tokenizer):
    return library.GenerationPanel(model, tokenizer, "def", pause=0)


def probabilities(panel):
    """The percentages in the bar chart, and which of them are cut off."""
    return [(float(p), bool(cut)) for p, cut in re.findall(r"<td> *([\d.]+)%( cut)?", panel.bars.value)]


def test_rows_are_the_filtered_distribution(library, model):
    logits = model(torch.tensor([[1, 2, 3]]))[0][0, -1].detach()
    rows = library.next_token_rows(logits, count=300, temperature=0.7, top_k=5)
    wanted, tokens = torch.softmax(logits / 0.7, -1).sort(descending=True)
    assert [token for token, _, _ in rows] == tokens[:len(rows)].tolist()
    assert torch.allclose(torch.tensor([before for _, before, _ in rows]), wanted[:len(rows)], atol=1e-6)
    assert sum(after > 0 for _, _, after in rows) == 5 and abs(sum(after for _, _, after in rows) - 1) < 1e-5
    assert [after for _, _, after in library.next_token_rows(logits, temperature=0)] == [1.0] + [0.0] * 11


def test_one_row_is_marked_as_chosen_though_many_bytes_look_alike(library, tokenizer):
    rows = [(token, 0.01, 0.01) for token in range(0x80, 0xc0)]
    assert {tokenizer.decode([token]) for token, _, _ in rows} == {"\ufffd"}
    assert library.bars_html(rows, tokenizer, chosen=0x90).count("chosen") == 1


def test_an_invalid_byte_is_shown_and_the_text_goes_on(library, panel, tokenizer):
    stream = iter([torch.tensor([0xff]), *map(torch.tensor, [[token] for token in tokenizer.encode_ordinary("ok")])])
    library.stream_into(panel, [tokenizer.eot_token], stream, threading.Event())
    assert "\ufffdok" in panel.text.value
    prompt = [tokenizer.eot_token, *tokenizer.encode_ordinary("def")]
    library.stream_into(panel, prompt, iter([torch.tensor([tokenizer.eot_token])]), threading.Event())     # it ends at once
    assert ">def<" in panel.text.value and "ok" not in panel.text.value


def test_bars_follow_the_knobs(panel):
    before = probabilities(panel)
    assert len(before) == 12 and not any(cut for _, cut in before)
    panel.knobs["temperature"].value = 0.3
    assert probabilities(panel)[0][0] > before[0][0]
    panel.knobs["top_k"].value = 3
    assert [cut for _, cut in probabilities(panel)] == [False] * 3 + [True] * 9
    panel.knobs["top_k"].value, panel.knobs["temperature"].value = 0, 0
    assert [cut for _, cut in probabilities(panel)] == [False] + [True] * 11
    panel.knobs["prompt"].value = "def f(x):\n    return"
    assert probabilities(panel) != before


def test_it_generates_what_generate_does_and_a_token_can_be_asked(library, panel, model, tokenizer):
    panel.knobs["max_new_tokens"].value = 20
    panel.start_button.click()
    panel.thread.join(30)
    text = library.generate(model, tokenizer, "def", 20, temperature=0.8, seed=1)[0]
    assert library.html.escape(text) in panel.text.value and "▌" not in panel.text.value
    new = panel.ids[len(library.encode_prompt(tokenizer, "def")):]
    assert [label for label, _ in panel.tokens.options] == [library.visible(tokenizer.decode([i])) for i in new]
    panel.knobs["temperature"].value = 1.0
    panel.tokens.value = place = panel.tokens.options[3][1]
    wanted = torch.softmax(model(torch.tensor([panel.ids[:place]]))[0][0, -1], -1)
    assert abs(probabilities(panel)[0][0] / 100 - float(wanted.detach().max())) < 6e-4


@pytest.mark.parametrize("prompt", ["def", "def f(x):\n    return x + 1\n" * 8])
def test_a_token_of_a_text_that_outgrew_the_context_was_drawn_from_what_is_shown(panel, model, prompt):
    panel.knobs["prompt"].value, panel.knobs["max_new_tokens"].value, panel.knobs["temperature"].value = prompt, 150, 0
    panel.start_button.click()
    panel.thread.join(60)
    places = [place for _, place in panel.tokens.options]
    assert len(panel.ids) > 2 * model.config.context_length
    for place in places:
        panel.tokens.value = place
        assert int(panel.logits.argmax()) == panel.chosen == panel.ids[place]


def test_knobs_answer_while_it_generates_and_stop_stops(panel):
    panel.pause, panel.knobs["max_new_tokens"].value = 0.05, 500
    panel.start_button.click()
    before = panel.bars.value
    panel.knobs["top_k"].value = 3
    assert panel.bars.value != before and panel.thread.is_alive()
    panel.stop_button.click()
    panel.thread.join(10)
    assert not panel.thread.is_alive() and len(panel.ids) < 300


def test_any_error_in_the_thread_ends_in_a_sentence(panel):
    panel.model = None
    panel.start_button.click()
    panel.thread.join(10)
    assert "NoneType" in panel.message.value


def test_the_attention_panel_draws_the_chosen_head(library, model, tokenizer, monkeypatch):
    drawn = []
    monkeypatch.setattr(library, "display", drawn.append)
    for text, layer in (("def f(x): return x", 0), ("x" * 500, 1), ("$x$ 東京", 1)):
        library.attention_on(model, tokenizer, {(1, 0): ["previous token 0.90"]}, text, layer, 0)
    titles = [figure.axes[0].get_title(loc="left") for figure in drawn]
    assert "clear in none" in titles[0] and titles[1] == titles[2] == "layer 1, head 0: previous token 0.90"
    assert drawn[1].axes[0].images[0].get_array().shape == (48, 48)


@pytest.fixture
def tweak(library, tokenizer):
    settings = library.make_settings("smoke", lab_seconds=0.3, context_length=16, n_embd=16, evaluations=2)
    tokens = torch.randint(tokenizer.n_vocab - 1, (3000,), generator=torch.Generator().manual_seed(0))
    tokens[::50] = tokenizer.eot_token
    lab = dict(tokens=tokens, tokenizer=tokenizer, device=torch.device("cpu"), precision=torch.float32)
    score = lambda model: library.evaluate(model, tokens[:500], 800)["bits_per_byte"]
    trials = library.sweep(library.varied(settings, {}), [1], {"lab_seconds": 0.3}, score, **lab)
    return library.TweakPanel(settings, trials, score, lab)


def test_the_tweak_panel_trains_in_the_background(tweak):
    for name, text, words in (("n_embd", "wide", "n_embd is &#x27;wide&#x27;, but it must be of type int"),
                              ("n_embd", "15", "multiple of n_head"), ("position", "nowhere", "must be one of")):
        before, tweak.fields[name].value = tweak.fields[name].value, text
        tweak.train_button.click()
        assert words in tweak.message.value and tweak.thread is None
        tweak.fields[name].value = before
    tweak.fields["n_embd"].value, tweak.fields["position"].value = "32", "none"
    tweak.train_button.click()
    tweak.thread.join(60)
    assert "n_embd=32" in tweak.table.value and bytes(tweak.picture.value).startswith(b"\x89PNG")
    tweak.fields["lab_seconds"].value = "100"
    tweak.train_button.click()
    while "step" not in tweak.message.value and tweak.thread.is_alive():
        time.sleep(0.05)
    tweak.stop_button.click()
    tweak.thread.join(60)
    assert "stopped" in tweak.message.value and len(tweak.trials["rows"]) == 3
    tweak.fields["lab_seconds"].value = "0.3"
    for error, words in ((ZeroDivisionError("division by zero"), "division by zero"), (SystemExit(), "SystemExit"), (MemoryError(), "MemoryError")):
        def score(model):
            raise error
        tweak.score = score
        tweak.train_button.click()
        tweak.thread.join(60)
        assert words in tweak.message.value


def test_a_lab_that_replaces_a_definition_does_not_reach_a_panel_that_trains(library, tweak):
    tweak.fields["lab_seconds"].value = "5"
    tweak.train_button.click()
    while "step" not in tweak.message.value and tweak.thread.is_alive():
        time.sleep(0.01)
    assert tweak.thread.is_alive()
    with library.replaced({"attention_weights": lambda *arguments: 1 / 0}):
        assert len(tweak.trials["rows"]) == 2, "it did not wait until the trial had ended"
        assert not library.model_lock.acquire(blocking=False)
    tweak.thread.join(60)
    assert "done" in tweak.message.value


def test_recording_catches_no_call_of_another_thread(library, model):
    """Another thread runs the same model in the middle of the recorded pass, hooks and all."""
    tokens, other = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[7, 8]])
    alone = library.record_attention(model, tokens), library.logit_lens(model, tokens)

    def meanwhile(block, arguments):
        if arguments[0].shape[1] == 5:
            thread = threading.Thread(target=model, args=(other,))
            thread.start()
            thread.join()

    with model.blocks[1].register_forward_pre_hook(meanwhile):
        weights, lens = library.record_attention(model, tokens), library.logit_lens(model, tokens)
    assert len(weights) == len(alone[0]) and all(map(torch.equal, weights, alone[0])) and torch.equal(lens, alone[1])
    assert not any(block._forward_hooks or block.attention._forward_hooks for block in model.blocks)

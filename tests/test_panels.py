"""The panels without a browser: what their widgets hold after each action. test_browser.py sees
them in JupyterLab."""
import re

import pytest
import torch

import referees


@pytest.fixture(scope="module")
def tokenizer(library):
    return library.build_tokenizer(library.train_bpe(
        ["def f(x):\n    return x + 1", "naïve 東京"] * 3, 300))


@pytest.fixture
def model(library, tokenizer):
    return referees.scrambled(library, referees.small_config(library, vocab_size=tokenizer.n_vocab,
        context_length=64)).float()


@pytest.fixture
def panel(library, model, tokenizer):
    return library.GenerationPanel(model, tokenizer, "def", pause=0)


def probabilities(panel):
    """The percentages in the bar chart, and which of them are cut off."""
    return [(float(p), bool(cut)) for p, cut in re.findall(r" ([\d.]+)% (cut)?", panel.bars.value)]


def test_rows_are_the_filtered_distribution(library, model):
    logits = model(torch.tensor([[1, 2, 3]]))[0][0, -1].detach()
    rows = library.next_token_rows(logits, count=300, temperature=0.7, top_k=5)
    wanted, tokens = torch.softmax(logits / 0.7, -1).sort(descending=True)
    assert [token for token, _, _ in rows] == tokens[:len(rows)].tolist()
    assert torch.allclose(torch.tensor([before for _, before, _ in rows]), wanted[:len(rows)],
                          atol=1e-6)
    assert sum(after > 0 for _, _, after in rows) == 5 and abs(
        sum(after for _, _, after in rows) - 1) < 1e-5
    assert [after for _, _, after in library.next_token_rows(logits, temperature=0)] == [1.0] + [
        0.0] * 11


def test_one_row_is_marked_as_chosen_though_many_bytes_look_alike(library, tokenizer):
    rows = [(token, 0.01, 0.01) for token in range(0x80, 0xc0)]
    assert {tokenizer.decode([token]) for token, _, _ in rows} == {"\ufffd"}
    assert library.bars_text(rows, tokenizer, chosen=0x90).count("chosen") == 1


def test_an_invalid_byte_is_shown_and_the_text_goes_on(library, panel, tokenizer):
    stream = iter([torch.tensor([0xff]), *map(torch.tensor,
                                              [[token] for token in tokenizer.encode_ordinary(
                                                  "ok")])])
    library.write(panel, [tokenizer.eot_token], stream)
    assert "\ufffdok" in panel.text.value
    prompt = [tokenizer.eot_token, *tokenizer.encode_ordinary("def")]
    library.write(panel, prompt, iter([torch.tensor([tokenizer.eot_token])]))     # it ends at once
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
    assert [label for label, _ in panel.tokens.options] == [library.visible(tokenizer.decode([i]))
        for i in new]
    panel.knobs["temperature"].value = 1.0
    panel.tokens.value = place = panel.tokens.options[3][1]
    wanted = torch.softmax(model(torch.tensor([panel.ids[:place]]))[0][0, -1], -1)
    assert abs(probabilities(panel)[0][0] / 100 - float(wanted.detach().max())) < 6e-4


@pytest.mark.parametrize("prompt", ["def", "def f(x):\n    return x + 1\n" * 8])
def test_a_token_of_a_text_that_outgrew_the_context_was_drawn_from_what_is_shown(
        panel, model, tokenizer, prompt):
    panel.knobs["prompt"].value = prompt
    panel.knobs["max_new_tokens"].value = 150
    panel.knobs["temperature"].value = 0
    panel.start_button.click()
    panel.thread.join(60)
    assert len(panel.ids) > 2 * model.config.context_length
    for _, place in panel.tokens.options:
        panel.tokens.value = place
        first = panel.bars.value.split("\n")[0]  # greedy: the likeliest was chosen
        assert "chosen" in first and "% cut" not in first


def test_a_click_while_it_writes_changes_nothing(library, panel, model):
    """With dropout in the model: one thread at a time has it, in its mode."""
    library.dataclasses.replace(model.config, dropout=0.5)
    for block in model.blocks:
        block.attention.dropout = block.feed_forward.dropout = 0.5
    model.train()
    panel.knobs["max_new_tokens"].value = 40
    texts = []
    for clicks in (0, 30):
        panel.start_button.click()
        for _ in range(clicks):
            library.show_bars(panel)
        panel.thread.join(30)
        texts.append(panel.text.value)
    assert texts[0] == texts[1] and model.training


def test_the_old_panel_lets_go_of_its_model(library, model, tokenizer):
    panel = library.GenerationPanel(model, tokenizer, "def")
    panel.start_button.click()
    panel.close()
    assert panel.model is None and not panel.thread.is_alive()


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
    assert "clear in none" in titles[0] and titles[1] == titles[
        2] == "layer 1, head 0: previous token 0.90"
    assert drawn[1].axes[0].images[0].get_array().shape == (48, 48)

"""The panels without a browser: what their widgets hold after each action. test_browser.py sees them in JupyterLab."""
import re
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
    return library.WritingPanel(model, tokenizer, "def", pause=0)


def shares(panel):
    """The percentages in the bar chart, and which of them are cut off."""
    return [(float(share), bool(cut)) for share, cut in re.findall(r"<td> *([\d.]+)%( cut)?", panel.bars.value)]


def test_rows_are_the_filtered_distribution(library, model, tokenizer):
    logits = model(torch.tensor([[1, 2, 3]]))[0][0, -1].detach()
    rows = library.next_token_rows(logits, tokenizer, count=300, temperature=0.7, top_k=5)
    wanted = torch.softmax(logits / 0.7, -1).sort(descending=True)[0][:len(rows)]
    assert torch.allclose(torch.tensor([before for _, before, _ in rows]), wanted, atol=1e-6)
    assert sum(after > 0 for _, _, after in rows) == 5 and abs(sum(after for _, _, after in rows) - 1) < 1e-5
    assert [after for _, _, after in library.next_token_rows(logits, tokenizer, temperature=0)] == [1.0] + [0.0] * 11


def test_bars_follow_the_sliders(panel):
    before = shares(panel)
    assert len(before) == 12 and not any(cut for _, cut in before)
    panel.temperature.value = 0.3
    assert shares(panel)[0][0] > before[0][0]
    panel.top_k.value = 3
    assert [cut for _, cut in shares(panel)] == [False] * 3 + [True] * 9
    panel.top_k.value, panel.temperature.value = 0, 0
    assert [cut for _, cut in shares(panel)] == [False] + [True] * 11
    panel.prompt.value = "def f(x):\n    return"
    assert shares(panel) != before


def test_it_writes_what_generate_writes_and_a_token_can_be_asked(library, panel, model, tokenizer):
    panel.length.value = "20"
    library.start_writing(panel)
    panel.thread.join(30)
    text = library.generate(model, tokenizer, "def", 20, temperature=0.8, seed=1)[0]
    assert library.html.escape(text) in panel.text.value
    labels = [label for label, _ in panel.tokens.options]
    assert "".join(labels) == "".join(library.visible(tokenizer.decode([i])) for i in panel.ids[len(library.encode_prompt(tokenizer, "def")):])
    panel.temperature.value = 1.0
    place = panel.tokens.options[3][1]
    panel.tokens.value = place
    wanted = torch.softmax(model(torch.tensor([panel.ids[:place]]))[0][0, -1], -1)
    assert abs(shares(panel)[0][0] / 100 - float(wanted.detach().max())) < 6e-4


def test_sliders_answer_while_it_writes_and_stop_stops(library, panel):
    panel.pause, panel.length.value = 0.05, "500"
    library.start_writing(panel)
    before = panel.bars.value
    panel.top_k.value = 3
    assert panel.bars.value != before and panel.thread.is_alive()
    panel.stop_button.click()
    panel.thread.join(10)
    assert not panel.thread.is_alive() and len(panel.ids) < 300


@pytest.mark.parametrize("field, value, words", [
    ("seed", "-1", "seed is '-1'"), ("seed", "x", "must be a whole number"), ("seed", str(2**70), "seed is"), ("length", "0", "max_new_tokens is 0"),
    ("length", "many", "length is 'many'"), ("length", "", "length is ''")])
def test_a_bad_value_gives_a_sentence_in_the_panel(panel, field, value, words):
    getattr(panel, field).value = value
    panel.start_button.click()
    assert words in panel.message.value.replace("&#x27;", "'") and panel.thread is None
    getattr(panel, field).value = "5"
    panel.start_button.click()
    panel.thread.join(30)
    assert panel.message.value == "" and panel.text.value


def test_the_attention_panel_draws_the_chosen_head(library, model, tokenizer):
    panel = library.AttentionPanel(model, tokenizer, "def f(x): return x", {(1, 0): ["previous token 0.90"]})
    first = bytes(panel.picture.value)
    assert first.startswith(b"\x89PNG") and "best at none" in panel.caption.value
    panel.layer.value = 1
    assert bytes(panel.picture.value) != first and "previous token 0.90" in panel.caption.value
    panel.text.value = ""
    panel.text.value = "x" * 500
    assert "Only the first 48 tokens" in panel.caption.value


def bench_of(library, tokenizer, tmp_path):
    settings = library.make_settings("smoke", lab_seconds=0.3, context_length=16, n_embd=16, evaluations=2, checkpoint_dir=str(tmp_path))
    tokens = torch.randint(tokenizer.n_vocab - 1, (3000,), generator=torch.Generator().manual_seed(0))
    tokens[::50] = tokenizer.eot_token
    return library.TrialBench(settings, tokens, tokenizer, "stamp", torch.device("cpu"), torch.float32,
                              lambda model, precision: library.evaluate(model, tokens[:500], 800, precision), "def")


def test_trials_are_kept_and_compared(library, tokenizer, tmp_path):
    bench = bench_of(library, tokenizer, tmp_path)
    bench.run()
    trial = bench.run(n_layer=1)
    assert [one["name"] for one in bench.trials] == ["as set", "n_layer=1"] and bench.trials[0]["parameters"] > trial["parameters"]
    figure, text = bench.compare(trial)
    assert "n_layer=1" in text and "tokens/s" in text and text.count("── ") == 2 and len(figure.axes[0].lines) == 2
    with pytest.raises(ValueError, match="n_head"):
        bench.run(n_head=3)
    assert len(bench.trials) == 2


def test_the_tweak_panel_trains_in_the_background(library, tokenizer, tmp_path):
    bench = bench_of(library, tokenizer, tmp_path)
    panel = library.TweakPanel(bench, seconds=0.3)
    panel.fields["n_embd"].value = "wide"
    panel.train_button.click()
    assert "n_embd is &#x27;wide&#x27;" in panel.message.value and panel.thread is None
    panel.fields["n_embd"].value = "15"
    panel.train_button.click()
    assert "multiple of n_head" in panel.message.value and panel.thread is None
    panel.fields["n_embd"].value, panel.fields["position"].value = "32", "none"
    panel.train_button.click()
    panel.thread.join(60)
    assert bench.trials[0]["changes"] == {"n_embd": 32, "position": "none"} and "n_embd=32" in panel.table.value and panel.picture.value
    panel.fields["lab_seconds"].value = "100"
    panel.train_button.click()
    while "step" not in panel.message.value and panel.thread.is_alive():
        time.sleep(0.05)
    panel.stop_button.click()
    panel.thread.join(60)
    assert "stopped" in panel.message.value and len(bench.trials) == 2

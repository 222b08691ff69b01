"""Section 13's labs, and the model that ships: what they claim can be had again."""
import dataclasses, json, re, shutil

import pytest
import torch

import referees
from conftest import ROOT, code_cells, committed, outputs_text, run_with

RECORDS = json.loads((ROOT / "checkpoints" / "recorded.json").read_text(encoding="utf-8"))
POINTS = {"parts": "part_points(lab_settings)", "positions": "position_points(lab_settings)",
          "sizes": "size_points(lab_settings, tokenizer.n_vocab)"}


@pytest.mark.parametrize("lab", POINTS)
def test_records_fit_the_points_of_the_labs(library, lab):
    settings, record = library.make_settings("laptop"), RECORDS[lab]
    assert any(POINTS[lab] in "".join(cell["source"]) for _,
               cell in code_cells()), "the lab has other points"
    points = eval(POINTS[lab].replace("tokenizer.n_vocab", "2048"),
                  vars(library) | dict(lab_settings=settings))
    assert list(record["rows"]) == list(points) and len(record["seeds"]) >= 3
    assert record["settings"]["preset"] == "laptop"
    for name, row in record["rows"].items():
        assert all(len(scores) >= 3 for scores in row["scores"].values())
        assert set(row["steps"]) == {points[name].max_steps}


def small_lab(library):
    tokens = torch.randint(60, (4000,), generator=torch.Generator().manual_seed(0))
    tokenizer = type("Tokenizer", (), {"n_vocab": 61, "eot_token": 60})
    return dict(tokens=tokens, tokenizer=tokenizer, device=torch.device("cpu"),
                precision=torch.float32)


def small_settings(library, **changes):
    return dataclasses.replace(library.make_settings("smoke"), batch_size=8, accumulation_steps=1,
                               context_length=32,
                               max_steps=30, **changes)


def test_a_sweep_can_be_recorded_read_and_drawn(library, tmp_path, capsys):
    settings = small_settings(library, n_embd=16, checkpoint_dir=str(tmp_path))
    points = library.varied(settings, {}, dict(n_layer=1))

    def score(model):
        return {"validation text": float(model.config.n_layer)}
    assert library.recorded("mine", points, (1, 2, 3), score, **small_lab(library)) is None
    assert "has no runs 'mine'" in capsys.readouterr().out
    anew = library.varied(dataclasses.replace(settings, record_labs=True), {}, dict(n_layer=1))
    record = library.recorded("mine", anew, (1, 2, 3), score, **small_lab(library))
    again = library.recorded("mine", points, (1, 2, 3), score)
    assert again["rows"] == json.loads(json.dumps(record["rows"])) and record["seeds"] == [1, 2, 3]
    assert record["rows"]["n_layer=1"]["scores"] == {"validation text": [1.0] * 3}
    assert record["rows"]["as set"]["steps"] == [30] * 3
    axes, = library.plot_sweep(record, "title", {"n_layer=1": "as set"}).axes
    assert [line.get_text() for line in axes.get_yticklabels()] == ["as set", "n_layer=1"]
    assert [bar.lines[0].get_markerfacecolor() for bar in axes.containers] == ["white", "C0"]


def test_a_swap_says_which_is_better(library):
    settings, lab = small_settings(library), small_lab(library)
    scores = iter([2.0, 1.0] * 2 + [1.0, 2.0] * 2 + [1.0, 2.0, 2.0, 1.0])
    verdicts = [library.swap({"Block": library.ShiftedBlock}, settings, (1, 2), None,
                             lambda model: {"validation text": next(scores)}, **lab)
                for _ in range(3)]
    assert [verdict.split(" with")[0].split(":")[0] for verdict in verdicts] == [
        "Yours is better", "Yours is worse", "The seeds don't agree"]


def test_a_model_reads_further_with_the_same_weights(library):
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    for position in ("none", "sinusoidal", "rotary", "learned"):
        config = referees.small_config(library, position=position, context_length=12)
        model = referees.scrambled(library, config).float()
        found = library.scores_further(lambda twin: {"validation text": twin(tokens)[0]}, model)
        assert list(found) == ["×1", "×2", "×4"][:1 if position == "learned" else 3]
        assert all(torch.allclose(logits, model(tokens)[0], atol=1e-6) for logits in found.values())


def test_replaced_definitions_come_back(library):
    before = library.get_batch
    with pytest.raises(ZeroDivisionError), library.replaced({"get_batch": None}):
        assert library.get_batch is None
        1 / 0
    assert library.get_batch is before


@pytest.mark.parametrize("name, check", [
    ("leaky mask", "no later token"), ("unshifted targets", "targets are"),
    ("no 1/√d", "attention equals"), ("no residual", "every parameter"),
    ("infinite weight", "the training step")])
def test_the_gallery_catches_a_failure_and_passes_the_healthy_twin(library, name, check):
    lab, failure = small_lab(library), library.FAILURES[name]
    settings = small_settings(library, **failure.get("both", {}))
    validation = lab["tokens"][:500]
    good, _, fine = library.train_and_check(settings, {}, False, validation, **lab)
    _, _, failed = library.train_and_check(settings, failure["replace"], "fooled" in failure,
                                           validation, **lab)
    assert not fine and len(failed) == 1 and next(iter(failed)).startswith(check)
    assert len(good) == 30


def test_the_committed_gallery_shows_and_catches_all(library):
    text = outputs_text(json.loads(committed("gpt_from_scratch.ipynb")))
    for name in library.FAILURES:
        broken, healthy, caught = re.search(
            rf"{re.escape(name)}: .*; validation ([\d.]+|nan), healthy ([\d.]+)\.\n"
            r" +caught by: (.*)",
            text).groups()
        assert not float(broken) <= float(healthy) + 0.1 and "nothing yet" not in caught, name


# The model that ships

@pytest.fixture
def copy(tmp_path):
    """A folder with the checkpoints that ship, in a folder of their name."""
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints",
                    ignore=shutil.ignore_patterns("*.lock"))
    return tmp_path


@pytest.mark.slow
def test_the_pretrained_model_opens_and_scores_what_it_says(library, copy):
    path = ROOT / "checkpoints" / "pretrained.pt"
    said = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["scores"]
    text = run_with(copy, 'preset, changes = "pretrained", dict(samples=200)', "## 12 ")
    score = float(re.search(r"^GPT +([\d.]+) bits per byte", text, re.M).group(1))
    valid = float(re.search(r"^GPT, min-p 0.1 .*?%.*? +([\d.]+)% ", text, re.M).group(1)) / 100
    assert abs(score - said["bits_per_byte"]) < 0.04 and abs(
        valid - said["valid, min-p 0.1"]) < 0.08


def test_readme_gives_the_scores_of_the_pretrained_model():
    scores = json.loads((ROOT / "checkpoints" / "pretrained.json").read_text(encoding="utf-8"))[
        "scores"]
    said = re.search(r"On the held-out files of the standard library it scores (.*?)\. ",
                     committed("README.md")).group(1)
    assert re.findall(r"[\d.]+%|0\.\d{3}", said) == [
        f"{scores['bits_per_byte']:.3f}", f"{scores['test_bits_per_byte']:.3f}",
        f"{scores['valid']:.1%}", f"{scores['valid, min-p 0.1']:.1%}"]


@pytest.mark.long
def test_training_can_go_on_from_the_pretrained_model(copy):
    changes = dict(pretrained=False, start_from="pretrained", max_steps=3, context_length=128,
                   corpus_megabytes=0.8, held_out_fraction=0.12, evaluations=1, warmup_steps=0,
                   sample_tokens=16)
    text = run_with(copy, f'preset = "pretrained"\nchanges = {changes!r}',
                    "What the run went through",
                    ["print('FIRST LOSS', history['loss'][0], len(history['loss']))"])
    loss, steps = re.search(r"FIRST LOSS ([\d.]+) (\d+)", text).groups()
    assert "goes on from the model that ships" in text
    assert float(loss) < 3 and steps == "3"                 # a new one: ln 2048 = 7.6


def test_the_pretrained_model_is_small_and_in_half_precision(library):
    path = ROOT / "checkpoints" / "pretrained.pt"
    assert path.stat().st_size + path.with_suffix(".json").stat().st_size < 12_000_000
    assert {t.dtype for t in library.read_checkpoint(path)["model"].values()} == {torch.bfloat16}


@pytest.mark.parametrize("name, content, words", [
    ("json", None, "pretrained.json can't be read"), ("json", "{", "pretrained.json can't be read"),
    ("pt", None, "its weights can't be had"), ("pt", "cut", "its weights can't be had")])
def test_a_damaged_pretrained_model_is_refused_in_a_sentence(library, copy, name, content, words):
    settings = library.make_settings("pretrained", checkpoint_dir=str(copy / "checkpoints"))
    merges, model = library.make_tokenizer(settings, [])[0], library.GPT(
        library.make_config(settings, 2048))
    path = copy / "checkpoints" / f"pretrained.{name}"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[:-9] if content == "cut" else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        library.load_pretrained(settings, model, merges)
    assert "\n" not in str(caught.value) and "pretrained=False" in str(caught.value)


@pytest.mark.parametrize("changes, words", [
    (dict(n_layer=4), "n_layer is 4, but the pretrained model has 6"),
    (dict(vocab_size=512), "vocab_size is 512, but the pretrained model has 2048")])
def test_another_shape_than_the_pretrained_is_refused_in_a_sentence(library, copy, changes, words):
    with pytest.raises(ValueError, match=words):
        library.make_tokenizer(library.make_settings("pretrained", **changes,
                                                     checkpoint_dir=str(copy / "checkpoints")), [])

"""Nothing lost, nothing let in: kills, damaged files, stops, locks, bad settings, files of
readers."""
import contextlib, dataclasses, gzip, json, math, os, pathlib, random, re, shutil, signal
import subprocess, sys, threading, time

import pytest
import torch
from hypothesis import given, strategies as st

import referees
from conftest import cells_of_sections, load_library

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
TOKENS = torch.randint(300, (500,), generator=torch.Generator().manual_seed(0))
MERGES = [(b"a", b"b")]


@pytest.fixture(scope="module")
def tokenizer(library):
    return library.build_tokenizer(MERGES)


def small_run(library, path=None, before_step=None, precision=torch.float32, **changes):
    """A small run before its first step, or at that of its checkpoint."""
    run = referees.small_run(library, precision=precision, **{"dropout": 0.1, **changes})
    if path is not None:
        library.resume(run, pathlib.Path(path), MERGES, "stamp")
    if before_step is not None:
        run.model.register_forward_pre_hook(lambda *_: before_step(run))
    return run


def save(library, run, path):
    library.save_checkpoint(path, run, MERGES, "stamp")


def train(library, run, path, stop=None, measure=None):
    """Trains as section 8 does; it saves at the end, and with `measure` also before some steps."""
    library.train(run, TOKENS, measure, lambda: save(library, run, path), stop, show=False)
    return run


def state(run):
    return [run.model.state_dict(), [optimizer.state_dict() for optimizer in run.optimizers],
            run.history["loss"], run.history["norm"], run.generator.get_state()]


def same(a, b):
    """Equal to the bit, in nested containers of tensors and plain values."""
    if isinstance(a, dict):
        a, b = ([part for item in pairs.items() for part in item] for pairs in (a, b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@contextlib.contextmanager
def refused(words, kind=ValueError):
    """The block must end in an error of this kind: one sentence, with these words (a pattern)."""
    with pytest.raises(kind, match=words) as caught:
        yield
    assert "\n" not in str(caught.value)


def start(*function_and_arguments):
    """A process that runs a function of this file."""
    program = "import sys, test_faults as t; getattr(t, sys.argv[1])(*sys.argv[2:])"
    return subprocess.Popen([sys.executable, "-c", program, *map(str, function_and_arguments)],
                            cwd=pathlib.Path(__file__).parent, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def train_slowly(path, hang_after=math.inf):
    def step(run):
        print("after step", len(run.history["loss"]), flush=True)
        if len(run.history["loss"]) == float(hang_after):
            time.sleep(600)                                 # until it is killed
    library = load_library()
    run = small_run(library, path, step, evaluations=12)        # it is measured before step 7, too
    train(library, run, path, measure=lambda step: {})


@pytest.mark.long
@posix
def test_killed_and_resumed_in_a_new_process_is_the_same_to_the_bit(library, tmp_path):
    path = tmp_path / "run.pt"
    process = start("train_slowly", path, 7)
    for line in process.stdout:
        if line == "after step 7\n":
            process.kill()
    assert process.wait() == -signal.SIGKILL
    printed = start("train_slowly", path).communicate(timeout=300)[0]
    assert re.match(r"picked up the checkpoint run.pt at step 7\n", printed), printed
    whole = train(library, small_run(library), tmp_path / "whole.pt")
    resumed = small_run(library, path, seed=1337)
    assert len(whole.history["loss"]) == 12 and same(state(resumed), state(whole))


def kill_while_saving(path, kills):
    torch.set_num_threads(1)
    library = load_library()
    rng, run, steps = random.Random(0), small_run(library), 0
    for _ in range(int(kills)):
        if not (child := os.fork()):
            while run.history["loss"].append(0.5) is None:
                save(library, run, path)
        while not os.path.exists(path):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        run = small_run(library, path)
        assert steps <= len(run.history["loss"])
        steps = len(run.history["loss"])
    print("saves", steps)


@posix
@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_valid_checkpoint_after_every_kill(tmp_path, kills):
    process = start("kill_while_saving", tmp_path / "run.pt", kills)
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    assert int(printed.split()[-1]) > kills, "it must have saved between the kills"
    assert set(os.listdir(tmp_path)) <= {"run.pt", "run.pt.part"}


@posix
@pytest.mark.parametrize("optimizer, step", [("muon", 1), ("muon", 7), ("adamw", 4)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_the_stop_button_ends_after_a_whole_step_and_nothing_is_lost(
        library, tmp_path, optimizer, step, precision):
    path, usual = tmp_path / "run.pt", signal.getsignal(signal.SIGINT)

    def press(run):                                         # in the middle of a step
        if len(run.history["loss"]) == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
    options = dict(optimizer=optimizer, precision=precision)
    whole = train(library, small_run(library, **options), tmp_path / "whole.pt")
    run = small_run(library, before_step=press, **options)
    with refused(f"^stopped after step {step}; run the cell again to go on$", KeyboardInterrupt):
        with library.stop_between_steps() as stop:
            train(library, run, path, stop)
    assert len(run.history["loss"]) == step and signal.getsignal(signal.SIGINT) is usual
    shutil.copy(path, tmp_path / "copy.pt")
    assert same(state(train(library, run, path)), state(whole))     # the cell run again
    anew = small_run(library, tmp_path / "copy.pt", **options)      # another kernel
    assert len(anew.history["loss"]) == step
    assert same(state(train(library, anew, path)), state(whole))


@posix
@pytest.mark.long
def test_the_stop_button_of_a_kernel(library, tmp_path):
    """JupyterLab's button interrupts the kernel. The run cell goes on when run again."""
    from jupyter_client.manager import start_new_kernel
    environment = {**os.environ, "GPT_PRESET": "smoke", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    manager, client = start_new_kernel(cwd=str(tmp_path), env=environment)
    stops = [0]
    try:
        sources = [source for source, _ in cells_of_sections(0, 8)]
        place = next(i for i, source in enumerate(sources) if "as stop:" in source)
        longer = ("settings = dataclasses.replace(settings, max_steps=5000, evaluations=100)\n"
                  "run.settings = settings")
        for source in [*sources[:place], longer]:
            reply = client.execute(source, reply=True, timeout=300)["content"]
            assert reply["status"] == "ok", reply
        for _ in range(2):
            begun = time.time()
            client.execute(sources[place], stop_on_error=False)
            while not (saved := [p for p in tmp_path.glob("checkpoints/*.pt")
                                 if p.stat().st_mtime > begun]):
                assert time.time() < begun + 200
                time.sleep(0.1)
            with refused("^another notebook is training this very run", RuntimeError):
                with library.locked(saved[0]):
                    pass
            manager.interrupt_kernel()
            reply = client.get_shell_msg(timeout=200)["content"]
            assert reply["ename"] == "KeyboardInterrupt"
            stopped = re.match(r"stopped after step (\d+); run the cell again", reply["evalue"])
            stops.append(int(stopped.group(1)))
            assert len(library.read_checkpoint(saved[0])["history"]["loss"]) == stops[-1]
        assert 0 < stops[1] < stops[2] < 5000
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_disk_that_refuses_leaves_what_was_there(library, tmp_path, monkeypatch):
    run, path = small_run(library), tmp_path / "run.pt"
    save(library, run, path)
    run.history["loss"].append(1.0)
    monkeypatch.setattr(library.os, "fsync", lambda _: open("/no_such"))
    with pytest.raises(OSError):
        save(library, run, path)
    assert library.read_checkpoint(path)["history"]["loss"] == []


class Payload:
    __reduce__ = lambda self: (os.mkdir, (str(Payload.target),))


def test_a_stranger_s_checkpoint_runs_nothing_and_is_set_aside(library, tmp_path, capsys):
    Payload.target, path = tmp_path / "ran", tmp_path / "run.pt"
    save(library, small_run(library), path)
    content = torch.load(path, weights_only=True)
    for evil, zipped in ((Payload(), True), ({**content, "config": Payload()}, True),
                         (Payload(), False)):
        torch.save(evil, path, _use_new_zipfile_serialization=zipped)
        assert library.read_checkpoint(path) is None and not path.exists()
        assert "it is set aside as run.pt.damaged" in capsys.readouterr().out
    assert not Payload.target.exists()


def test_checkpoints_of_other_models_and_texts_change_nothing(library, tmp_path, capsys):
    path = tmp_path / "run.pt"
    train(library, small_run(library), path)
    for run, stamp in ((small_run(library, n_layer=3), "stamp"), (small_run(library), "other")):
        before = [t.clone() for t in run.model.state_dict().values()], run.generator.get_state()
        assert not library.load_checkpoint(path, run, stamp)
        assert same(before, (list(run.model.state_dict().values()), run.generator.get_state()))
        assert "holds another model, or one of another text" in capsys.readouterr().out


@pytest.mark.parametrize("count", [80, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_checkpoints_never_load_wrongly(library, tmp_path, count):
    rng, wrong, path = random.Random(0), 0, tmp_path / "run.pt"
    train(library, small_run(library), path)
    good, expected = path.read_bytes(), library.read_checkpoint(path)
    for _ in range(count):
        data, at, kind = bytearray(good), rng.randrange(len(good)), rng.randrange(4)
        if kind < 2:                            # a bit anywhere, or in the table of contents
            data[(at, -1 - at % 2000)[kind]] ^= 1 << rng.randrange(8)
        else:                                   # cut off, or a piece replaced
            data[at:(None, at + 20)[kind - 2]] = rng.randbytes(rng.randrange(9))
        path.write_bytes(data)
        content = library.read_checkpoint(path)
        assert content is None or same(content, expected)
        wrong += content is None
    assert wrong > count / 2 and not path.exists() or content is not None


@pytest.mark.parametrize("step, changes", [(1, {}), (5, dict(max_steps=20)), (11, {}),
                                           (7, dict(evaluations=5)), (4, dict(learning_rate=0.5))])
def test_a_run_goes_on_at_any_step_with_the_settings_of_now(library, tmp_path, step, changes):
    """Equal to the run that was never stopped but had the other settings from that step on."""
    path = tmp_path / "run.pt"
    begun = small_run(library)
    for _ in range(step):
        for name, value in zip(("loss", "norm", "rate"), library.training_step(begun, TOKENS)):
            begun.history[name].append(value)
    save(library, begun, path)
    begun.settings = dataclasses.replace(begun.settings, **changes)
    later = small_run(library, path, seed=1337, **changes)
    for run in (begun, later):
        torch.manual_seed(1)
        library.train(run, TOKENS, show=False)
    assert same(state(begun), state(later))
    assert len(later.history["loss"]) == later.settings.max_steps


def test_a_loss_that_is_no_number_updates_nothing(library, tmp_path):
    run = small_run(library)
    run.model.final_norm.weight.data[0] = math.inf
    before = [p.clone() for p in run.model.parameters()]
    with refused("^step 0: the loss is nan, .*nothing was updated. Try half", FloatingPointError):
        train(library, run, tmp_path / "run.pt")
    assert same(before, list(run.model.parameters()))


def test_gradients_that_a_broken_step_left_do_not_count(library, tmp_path):
    whole = train(library, small_run(library), tmp_path / "other.pt")
    run = small_run(library)
    for p in run.model.parameters():
        p.grad = torch.full_like(p, math.nan)
    assert same(state(train(library, run, tmp_path / "run.pt")), state(whole))


def test_the_checkpoints_name_follows_settings_data_and_code(library):
    settings = library.make_settings("smoke")
    name = library.run_name(settings, "s")
    assert name == load_library().run_name(settings, "s")
    for old, new in (("torch.relu(x).square()", "torch.relu(x)"), ("# tokens talk", "# changed")):
        assert load_library([(old, new)]).run_name(settings, "s") != name
    library = load_library()                                # the sources as they are again
    assert library.run_name(settings, "other") != name
    for changes, as_before in ((dict(max_steps=9999, minutes=1.0, precision="float32"), True),
                               (dict(n_embd=32), False), (dict(seed=1), False)):
        changed = dataclasses.replace(settings, **changes)
        assert (library.run_name(changed, "s") == name) is as_before
    exec("def typed(): pass", space := {})
    assert library.source_of(space["typed"]) == ""          # as in a terminal: no source


def test_steps_that_fit(library):
    settings = library.make_settings(max_steps=100, minutes=1.0)
    assert [library.steps_that_fit(settings, s) for s in (3.0, 0.001, 1e9)] == [20, 100, 1]
    endless = dataclasses.replace(settings, minutes=math.inf)
    assert library.steps_that_fit(endless, 1e9) == 100


def test_a_run_can_be_made_anew(library, tmp_path):
    path = tmp_path / "run.pt"
    train(library, small_run(library), path)
    anew = small_run(library, path, reuse_checkpoint=False, max_steps=5)
    assert anew.history["loss"] == [] and len(train(library, anew, path).history["loss"]) == 5


def test_a_token_file_is_made_once(library, tokenizer, tmp_path):
    texts, path = ["one two", "", "three"], tmp_path / "tokens" / "t.npy"
    tokens = library.load_tokens(path, texts, tokenizer)
    spelled = "".join(library.END_OF_TEXT + text for text in [*texts, ""])
    assert tokenizer.decode(tokens.tolist()) == spelled and tokens.dtype == torch.int32
    assert torch.equal(library.load_tokens(path, None, tokenizer), tokens)
    assert os.listdir(path.parent) == ["t.npy"]


def test_the_stamp_of_the_data_tells_where_a_set_ends(library, tokenizer):
    stamps = {library.fingerprint_of_data(tokenizer, {"test": texts[:n], "train": texts[n:]})
              for texts in (["a", "b", "c"], ["a", "c", "b"]) for n in (1, 2)}
    assert len(stamps) == 4


def test_a_device_that_is_not_there(library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    settings = library.make_settings("smoke", device="auto")
    assert library.choose_device(settings) == torch.device("cpu")
    with refused("^device is 'cuda', but it must be one of: cpu$"):
        library.choose_device(dataclasses.replace(settings, device="cuda"))


@pytest.mark.parametrize("changes", [
    dict(vocab_size=100), dict(vocab_size=512.0), dict(corpus=3), dict(position="rotari"),
    dict(position=None), dict(dropout=1.0), dict(dropout="0.1"), dict(learning_rate=math.nan),
    dict(learning_rate=0), dict(max_steps="100"), dict(max_steps=True), dict(qk_norm=1),
    dict(n_layer=0), dict(evaluations=0), dict(device="gpu"), dict(minutes=None),
    dict(no_such_setting=1)], ids=str)
def test_bad_settings(library, changes):
    with refused(rf"^{next(iter(changes))}\b.* "):
        library.make_settings(**changes)


def test_bad_presets_and_architectures(library):
    with refused("^preset is 'huge', but it must be one of: smoke"):
        library.make_settings("huge")
    for changes in (dict(n_embd=100), dict(n_embd=12, n_head=4, position="rotary"),
                    dict(position="no such")):
        with pytest.raises(AssertionError):
            library.GPTConfig(**changes)


def documents_of(library, name):
    settings = library.make_settings("smoke", corpus=str(name), data_dir=str(name.parent / "data"))
    return library.load_documents(settings)


@pytest.mark.parametrize("name, content", [
    ("a.txt", b""), ("a.png", b"x"), ("a.txt", b"\x89PNG\r\n\x00\xff"), ("a.py", b"def f(:"),
    ("a.jsonl", b'{"title": "a"}\n'), ("a.jsonl", b'{"text": 3}\n'), ("a.csv", b"story\nx\n"),
    ("a.jsonl", b'{"text": null}\n'), ("a.txt.gz", b"no gzip"), ("a.parquet", b"PAR1 no parquet"),
    ("a.json", b"[3]"), ("no file", None)])
def test_files_that_hold_no_text_are_one_sentence(library, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(rf"^corpus(?=.*{name}').*"):
        documents_of(library, tmp_path / name)


def test_a_bad_file_is_passed_over_in_one_line(library, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("A book. " * 300)
    bad = {"package.json": '{"name": "x"}', "b.csv": "other\nx\n", "c.py": "("}
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
    assert "".join(documents_of(library, tmp_path)["text"]) == "A book. " * 300
    assert len(re.findall("^passed over: ", capsys.readouterr().out, re.M)) == 3


@pytest.mark.parametrize("content, words", [
    (b" \n\n", "corpus leaves no document of 60 to 4000 bytes"),
    (b"one document " * 9, "corpus leaves the (train|validation|test) set empty")])
def test_files_with_too_little_text(library, tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    space = {**vars(library), "settings": library.make_settings(),
             "documents": documents_of(library, tmp_path / "a.txt")}
    sources = [source for source, tags in cells_of_sections(3, 3) if tags == ["run"]]
    with refused(f"^{words}"):
        for source in sources[1:3]:
            exec(source, space)


PROSE = ("The north wind and the sun disputed who was the stronger of the two, "
         "and a traveller came along. ")
KEPT = {  # name: (content, characters of it that are kept)
    "english.txt": (f"{PROSE * 24}\n".encode() * 20, len(PROSE) * 480),
    "russian.txt": (("Северный ветер и солнце спорили. " * 60 + "\n").encode() * 20,
                    33 * 1200),
    "chinese.md": (("北风和太阳争论谁更强。" * 30 + "\n").encode() * 30, 11 * 900),
    "BOOK.TXT": (PROSE.encode() * 9, len(PROSE) * 9),
    "latin.text": ("Señor, ¿dónde está? ".encode("latin-1") * 50, 1000),
    "windows.txt": (PROSE.encode("utf-16") * 9, len(PROSE) * 9),
    "crlf.markdown": (b"\xef\xbb\xbf" + b"one line\r\n" * 90, 9 * 90),
    "zipped.txt.gz": (gzip.compress(PROSE.encode() * 9), len(PROSE) * 9),
    "list.json": (json.dumps([{"text": PROSE}, {"text": None}, {"text": PROSE}]).encode(),
                  len(PROSE) * 2),
    "mixed.jsonl": ("".join(json.dumps({"n": n, "text": PROSE}) + "\n"
                            for n in [*range(3000), "late", None]).encode(), len(PROSE) * 3002),
    "table.csv": (b"text,n\n" + PROSE.replace(",", "").encode() + b",1\n", len(PROSE) - 1),
    "notes [1].txt": (PROSE.encode() * 9, len(PROSE) * 9)}


@pytest.mark.parametrize("name", KEPT)
def test_nine_tenths_of_a_text_are_used(library, tmp_path, name):
    content, characters = KEPT[name]
    folder = tmp_path / "old [2024] texts"
    folder.mkdir()
    (folder / name).write_bytes(content)
    (folder / "picture.png").write_bytes(b"x")
    for corpus in (folder, folder / name):
        rows = library.read_own_files(str(corpus), "text")
        used = [text for text in (library.normalise(row)["text"] for row in rows)
                if 60 <= len(text.encode()) <= 4000]
        assert 0.9 * characters <= sum(map(len, used)) <= 1.01 * characters


@pytest.mark.parametrize("data, expected", [
    (("é" * 50).encode()[:-1], "é" * 49 + "\ufffd"), (b"plain \xff" + b"x" * 10**5, None),
    ("naïve".encode("cp1252") * 9, "naïve" * 9)])
def test_encodings_are_not_guessed_from_too_little(library, tmp_path, data, expected):
    (tmp_path / "a.txt").write_bytes(data)
    text = library.decoded_text(tmp_path / "a.txt")
    assert text == (expected if expected is not None else data.decode("utf-8", "replace"))


def test_passages_join_to_the_text(library):
    rng = random.Random(0)
    for _ in range(200):
        parts = ["word ", "\n", "\n\n", "x" * rng.randrange(1, 90), "東京", "\t"]
        text = "".join(rng.choices(parts, k=rng.randrange(60)))
        pieces = list(library.passages(text, size=20))
        assert "".join(pieces) == text and all(len(piece.encode()) <= 20 for piece in pieces)


def test_a_document_larger_than_the_limit_is_read_and_nothing_after_it(library, tmp_path):
    rows = "".join(json.dumps({"text": text * 2000}) + "\n" for text in "ab")
    (tmp_path / "rows.jsonl").write_text(rows)
    found = list(library.read_corpus(str(tmp_path / "rows.jsonl"), "text", 0.001))
    assert [row["text"] for row in found] == ["a" * 2000]


def test_own_files_are_found_once_and_named_by_their_text(library, tmp_path):
    for name, text in (("a.txt", "first"), ("sub/b.txt", "second"), ("c.jpg", "no text")):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(text)
    with contextlib.suppress(OSError):                      # Windows may forbid links
        (tmp_path / "here/sub/loop").symlink_to(tmp_path / "here", target_is_directory=True)
        (tmp_path / "here/again.txt").symlink_to("a.txt")
    shutil.copytree(tmp_path / "here", tmp_path / "there", symlinks=True)
    places = tmp_path / "here", tmp_path / "there", tmp_path / "here/**/*.txt"
    found = [sorted((row["text"], row["source"]) for row in library.read_own_files(str(p), "text"))
             for p in places]
    assert found[0] == found[1] == found[2]
    assert [text for text, _ in found[0]] == ["first", "second"]


@given(st.lists(st.integers(1, 400), min_size=3, max_size=40), st.sampled_from([0.02, 0.06, 0.2]),
       st.integers(0, 99))
def test_held_out_sets_get_their_share_by_size(library, sizes, fraction, seed):
    sources = [f"{seed} {i}" for i in range(len(sizes))]
    sides = library.sides_by_size(sources, sizes, fraction)
    assert library.sides_by_size(sources[::-1], sizes[::-1], fraction) == sides[::-1]
    assert set(sides) == {"train", "validation", "test"}
    for name in ("validation", "test"):
        share = sum(size for size, side in zip(sizes, sides) if side == name) / sum(sizes)
        if max(sizes) <= fraction * sum(sizes) / 4:
            assert 0.5 * fraction <= share <= 1.5 * fraction


def test_any_prompt_works_and_is_text(library, tokenizer):
    model = library.GPT(referees.small_config(library, vocab_size=tokenizer.n_vocab))
    for prompt in ("", "x" * 100_000, "🎉🎉", "<|endoftext|>", "a\ud800b", "\x00"):
        ids = library.encode_prompt(tokenizer, prompt)
        assert [i for i, token in enumerate(ids) if token == tokenizer.eot_token] == [0]
        library.generate(model, tokenizer, prompt, 3, seed=0)


@pytest.mark.parametrize("options", [
    dict(prompt=None), dict(max_new_tokens=-1), dict(temperature=-0.5), dict(temperature=math.nan),
    dict(temperature=math.inf), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.01), dict(min_p=0)],
    ids=str)
def test_bad_options_of_sampling(library, tokenizer, options):
    model = library.GPT(referees.small_config(library, vocab_size=tokenizer.n_vocab))
    with refused("is .*, but it must be ", (ValueError, AssertionError)):
        library.generate(model, tokenizer, **{"prompt": "x", "max_new_tokens": 2, **options})


def test_a_second_notebook_is_told_before_its_first_step(library, tmp_path):
    path = tmp_path / "new" / "run.pt"
    with library.locked(path), refused("^another notebook is training this", RuntimeError):
        with library.locked(path):
            pass
    with library.locked(path):                              # the first has finished
        pass


def test_one_thread_at_a_time_uses_a_model(library):
    """While one thread holds a model in evaluation mode, another waits to train it."""
    run, entered = small_run(library), threading.Event()
    with library.evaluation_mode(run.model):
        thread = threading.Thread(target=lambda: (library.train(run, TOKENS, show=False),
                                                  entered.set()))
        thread.start()
        time.sleep(0.3)
        assert not run.model.training and not run.history["loss"]
    thread.join(60)
    assert entered.is_set() and len(run.history["loss"]) == 12

"""Nothing lost, nothing let in: kills, full disks, damaged files, the stop button, stale state, bad input."""
import contextlib, dataclasses, gzip, itertools, json, math, os, pathlib, random, re, shutil, signal, subprocess, sys, threading, time
import linecache, tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

import referees
from conftest import cells_of_sections, load_library

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, limits and permissions")
TOKENS = torch.randint(300, (500,), generator=torch.Generator().manual_seed(0))
MERGES = [(b"a", b"b")]
SMALL = dict(context_length=16, n_embd=16, max_steps=12, batch_size=2, evaluations=2, dropout=0.1)


@pytest.fixture(scope="module")
def tokenizer(library):
    return library.build_tokenizer(MERGES)


class Run:
    """A small run before its first step. before_step(run) is called whenever a step is under way."""

    def __init__(self, library, seed=1337, before_step=None, precision=torch.float32, **changes):
        self.library, self.precision, self.settings = library, precision, library.make_settings("smoke", **{**SMALL, **changes})
        torch.manual_seed(seed)
        self.model = library.GPT(library.make_config(self.settings, 300))
        self.optimizers = library.make_optimizers(self.model, self.settings, precision)
        self.generator, self.history = torch.Generator().manual_seed(seed), library.new_history()
        if before_step:
            self.model.register_forward_pre_hook(lambda *_: before_step(self))

    def save(self, path):
        self.library.save_checkpoint(path, self.model, self.optimizers, self.history, self.settings, MERGES,
                                     self.generator, "stamp")

    def pick_up(self, path):
        self.history = self.library.starting_history(self.settings, pathlib.Path(path), self.model, self.optimizers,
                                                     self.generator, MERGES, "stamp")
        return self

    def train(self, path, **options):
        self.library.train_safely(path, self.model, self.optimizers, TOKENS, self.settings, self.history, self.generator,
                                  self.precision, None, MERGES, "stamp", show=False, **options)
        return self

    def state(self):
        return [self.model.state_dict(), [optimizer.state_dict() for optimizer in self.optimizers], self.history["loss"],
                self.history["norm"], self.generator.get_state()]


def test_steps_that_fit_are_planned_once(library, tmp_path):
    """`minutes` only lowers max_steps; the plan is saved before the first step and holds, whatever the clock says later."""
    settings, history, tokens = library.make_settings(max_steps=100, minutes=1.0), library.new_history(), torch.zeros(10**6)
    plan = lambda changes, seconds, history: library.planned(library.dataclasses.replace(settings, **changes), seconds, tokens, history).max_steps
    assert plan({}, 3.0, history) == 20 and plan({}, 0.001, history) == plan({}, 50.0, history) == 20
    assert plan(dict(minutes=2.0), 3.0, history) == 40 and plan(dict(max_steps=30), 3.0, history) == 20
    assert plan({}, 0.001, {}) == plan(dict(minutes=None), 1e9, {}) == 100 and plan({}, 1e9, {}) == 1
    short = tokens[:library.MOST_EPOCHS]        # so many epochs of ten tokens
    assert library.planned(settings, 0.001, short, {}).max_steps == 1
    for own in (dict(dropout=0.0), dict(pretrained=True)):      # who sets dropout knows better; and nothing is trained
        assert library.planned(library.dataclasses.replace(settings, **own), 0.001, short, {}).max_steps == 100

    def die(*_):
        raise SystemExit
    run = Run(library, before_step=die)
    run.history["plan"] = {"asked": [60, 8.0], "steps": 50}
    with pytest.raises(SystemExit):
        run.train(tmp_path / "run.pt", measure=lambda step: {})
    assert library.read_checkpoint(tmp_path / "run.pt")["history"]["plan"] == run.history["plan"]


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
    return subprocess.Popen([sys.executable, "-c", program, *map(str, function_and_arguments)], text=True,
                            cwd=pathlib.Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train_slowly(path, hang_after=math.inf):
    def step(run):
        print("after step", len(run.history["loss"]), flush=True)
        if len(run.history["loss"]) == float(hang_after):
            time.sleep(600)                                 # until it is killed
    Run(load_library(), before_step=step).pick_up(path).train(path, save_every=0)


@pytest.mark.long
@posix
def test_killed_and_resumed_in_a_new_process_is_the_same_to_the_bit(library, tmp_path):
    path, process = tmp_path / "run.pt", start("train_slowly", tmp_path / "run.pt", 7)
    for line in process.stdout:
        if line == "after step 7\n":
            process.kill()
    assert process.wait() == -signal.SIGKILL
    printed = start("train_slowly", path).communicate(timeout=300)[0]
    assert re.match(r"picked up the checkpoint .* at step 7\n", printed), printed
    whole = Run(library).train(tmp_path / "whole.pt")
    assert len(whole.history["loss"]) == 12 and same(Run(library, seed=5).pick_up(path).state(), whole.state())


def kill_while_saving(path, kills):
    torch.set_num_threads(1)
    library, rng, steps = load_library(), random.Random(0), 0
    run = Run(library)
    for _ in range(int(kills)):
        if not (child := os.fork()):
            while run.history["loss"].append(0.5) is None:
                run.save(path)
        while not os.path.exists(path):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for file in (path, library.previous_checkpoint(path)):      # each of the two is whole, or not there
            assert not os.path.exists(file) or library.read_checkpoint(file)
        run.history = library.load_checkpoint(path, run.model, run.optimizers, run.generator)["history"]
        assert steps <= (steps := len(run.history["loss"]))
    print("saves", steps)


@posix
@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_valid_checkpoint_after_every_kill(tmp_path, kills):
    printed = (process := start("kill_while_saving", tmp_path / "run.pt", kills)).communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    assert int(printed.split()[-1]) > kills, "it must have saved between the kills"
    assert set(os.listdir(tmp_path)) <= {"run.pt", "run.previous.pt", "run.pt.part"}


@posix
@pytest.mark.parametrize("optimizer, step, by_signal", [("muon", 1, True), ("muon", 7, False), ("adamw", 4, True)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_the_stop_button_ends_after_a_whole_step_and_nothing_is_lost(library, tmp_path, optimizer, step, by_signal, precision):
    path, button, usual = tmp_path / "run.pt", threading.Event(), signal.getsignal(signal.SIGINT)

    def press(run):                                         # in the middle of a step
        if len(run.history["loss"]) == step - 1:
            os.kill(os.getpid(), signal.SIGINT) if by_signal else button.set()
    whole = Run(library, optimizer=optimizer, precision=precision).train(tmp_path / "whole.pt")
    run = Run(library, before_step=press, optimizer=optimizer, precision=precision)
    with refused(f"^stopped after step {step}; run the cell again to go on$", KeyboardInterrupt):
        run.train(path, stop=None if by_signal else button)
    assert len(run.history["loss"]) == step and signal.getsignal(signal.SIGINT) is usual
    shutil.copy(path, tmp_path / "copy.pt")
    assert same(run.train(path).state(), whole.state())     # the cell run again
    anew = Run(library, seed=5, optimizer=optimizer, precision=precision).pick_up(tmp_path / "copy.pt")
    assert len(anew.history["loss"]) == step and same(anew.train(tmp_path / "copy.pt").state(), whole.state())  # another kernel


@posix
@pytest.mark.long
def test_the_stop_button_of_a_kernel(library, tmp_path):
    """JupyterLab's button interrupts the kernel. The run cell goes on when run again; a second notebook is told so."""
    from jupyter_client.manager import start_new_kernel
    environment, stops = {**os.environ, "GPT_PRESET": "smoke", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}, [0]
    manager, client = start_new_kernel(cwd=str(tmp_path), env=environment)
    try:
        sources = [source for source, _ in cells_of_sections(0, 9)]
        place = next(i for i, source in enumerate(sources) if "measure=measure)" in source)
        for source in [*sources[:place], "settings = dataclasses.replace(settings, max_steps=5000, evaluations=100)"]:
            reply = client.execute(source, reply=True, timeout=300)["content"]
            assert reply["status"] == "ok", reply
        for _ in range(2):
            begun = time.time()
            client.execute(sources[place], stop_on_error=False)      # an error would drop what is asked next
            while not (saved := [p for p in tmp_path.glob("checkpoints/*.pt") if p.stat().st_mtime > begun]):
                assert time.time() < begun + 200
                time.sleep(0.1)
            path = saved[0].with_name(saved[0].name.replace(".previous", ""))
            with refused("^another notebook is training this very run", RuntimeError), library.locked(path):
                pass
            manager.interrupt_kernel()
            reply = client.get_shell_msg(timeout=200)["content"]
            assert reply["ename"] == "KeyboardInterrupt"
            stops.append(int(re.match(r"stopped after step (\d+); run the cell again", reply["evalue"]).group(1)))
            assert len(library.read_checkpoint(path)["history"]["loss"]) == stops[-1]
        assert 0 < stops[1] < stops[2] < 5000
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_said_and_the_run_goes_on(library, tokenizer, tmp_path, capsys):
    run, path = Run(library), tmp_path / "run.pt"
    run.save(path)
    before = path.read_bytes()
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "run.pt.part").symlink_to("/dev/full")
    run.train(path, save_every=math.inf)                    # saves at the end alone
    words = r".*run\.pt can't be written \(No space .*\); .* untouched; the run goes on; checkpoint: none yet\n"
    assert re.fullmatch(words, capsys.readouterr().out) and len(run.history["loss"]) == 12
    assert path.read_bytes() == before and not list(tmp_path.glob("*.part"))
    with pytest.raises(OSError, match="no_such"):
        library.load_tokens(tmp_path / "tokens", "stamp", map(lambda t: t or open("/no_such"), ["abc", ""]), tokenizer)
    assert os.listdir(tmp_path / "tokens") == []
    run = Run(library).train(tmp_path / "full" / "run.pt", save_every=0)    # no folder can be made there
    said = capsys.readouterr().out                          # once, though every step is to be saved
    assert re.fullmatch("no lock can be had for .*; training goes on without one\n.*run.pt can't be written .*; the run goes "
                        "on; checkpoint: none yet\n", said) and len(run.history["loss"]) == 12


@posix
def test_a_disk_that_fills_up_within_a_tensor_is_one_sentence(library, tmp_path):
    import resource                                         # Windows has none
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, usual[1]))
    try:
        with refused("run.pt can't be written \\(File too large\\); what stood there before is untouched", OSError):
            with library.atomic_write(tmp_path / "run.pt") as file:
                torch.save({"small": torch.zeros(9), "large": torch.zeros(1 << 20)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError, match="^another trouble$"):
        with library.atomic_write(tmp_path / "run.pt"):
            raise RuntimeError("another trouble")


def test_a_refused_rename_leaves_a_checkpoint(library, tmp_path, monkeypatch):
    run, replace = Run(library).train(tmp_path / "run.pt"), os.replace
    for refuse in (1, 2):                   # the first rename keeps the checkpoint before, the second sets the new one
        renames = iter((1, 2))
        monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if next(renames) != refuse else open("/no_such"))
        with refused("run.pt can't be written .No such file", OSError):
            run.save(tmp_path / "run.pt")
        assert len(Run(library, seed=5).pick_up(tmp_path / "run.pt").history["loss"]) == 12
        assert not list(tmp_path.glob("*.part"))


class Payload:
    __reduce__ = lambda self: (os.mkdir, (str(Payload.target),))


def test_a_stranger_s_checkpoint_runs_nothing(library, tmp_path):
    Payload.target, run, path = tmp_path / "ran", Run(library), tmp_path / "run.pt"
    run.save(path)
    content = torch.load(path, weights_only=True)
    for evil, zipped in ((Payload(), True), ({**content, "config": Payload()}, True), (Payload(), False)):
        torch.save(evil, path, _use_new_zipfile_serialization=zipped)
        with refused("is no whole checkpoint .*nothing in it was run$"):
            library.load_checkpoint(path, run.model)
    assert not Payload.target.exists()


def test_foreign_checkpoints_are_refused_and_change_nothing(library, tmp_path, capsys):
    path, run = tmp_path / "run.pt", Run(library).train(tmp_path / "run.pt")
    content, run, changed = torch.load(path, weights_only=True), Run(library, seed=5), Run(library, optimizer="adamw")
    before = [t.clone() for t in run.state()[0].values()], run.generator.get_state(), torch.get_rng_state()
    wrong = {"model": {}}, {"history": 3}, {"optimizers": content["optimizers"][::-1]}, {"optimizers": []}
    cases = [({}, Run(library, n_layer=3), {}, "another architecture: its n_layer is 2, here it is 3"),
             ({}, run, dict(merges=[(b"a", b"c")]), "another tokenizer"), ({}, changed, {}, "other .* optimisers"),
             ({}, run, dict(merges=MERGES, stamp="other"), "other data"), *((change, run, {}, "") for change in wrong)]
    torch.set_rng_state(before[2])
    for change, into, options, words in cases:
        torch.save({**content, **change}, path)
        with refused(words or "run.pt holds other parameters|no whole checkpoint"):
            library.load_checkpoint(path, into.model, into.optimizers, into.generator, **options)
    assert same(before, (list(run.state()[0].values()), run.generator.get_state(), torch.get_rng_state()))
    assert run.pick_up(path).history["loss"] == [] and "training starts afresh: " in capsys.readouterr().out


def test_dropout_follows_the_epochs_unless_it_is_set(library):
    tokens, by_steps = torch.zeros(1000), lambda steps, **changes: library.dropout_of(
        library.make_settings("smoke", max_steps=steps, context_length=10, batch_size=10, **changes), tokens)
    assert [by_steps(steps) for steps in (30, 31, 45, 46)] == [0, 0.1, 0.1, 0.2]        # ten steps are an epoch
    assert by_steps(46, dropout=0.0) == by_steps(46, pretrained=True) == 0 and by_steps(1, dropout=0.3) == 0.3


def test_dropout_can_be_changed_in_all_parts(library):
    run = Run(library, dropout=0.0)
    for parameter in run.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run.model.train()
    for fraction in (0.0, 0.5, 0.0):
        library.set_dropout(run.model, fraction)
        logits = [run.model(TOKENS[None, :16] % 200)[0] for _ in range(2)]
        assert torch.equal(*logits) == (fraction == 0) and run.model.config.dropout == fraction
        assert all(part.dropout == fraction for block in run.model.blocks for part in (block.attention, block.feed_forward))
    run.model.config = library.dataclasses.replace(run.model.config, dropout=0.5)       # after the embedding alone
    assert not torch.equal(*(run.model(TOKENS[None, :16] % 200)[0] for _ in range(2)))


def test_weights_go_on_with_another_dropout(library, tmp_path):
    """Raising max_steps on a short text switches dropout on; what was learned before must not be lost."""
    run, other = Run(library).train(tmp_path / "run.pt"), Run(library, seed=5, dropout=0.2)
    library.load_checkpoint(tmp_path / "run.pt", other.model, other.optimizers)
    assert same(list(run.model.parameters()), list(other.model.parameters())) and other.model.config.dropout == 0.2


def test_a_damaged_checkpoint_gives_way_to_the_one_before(library, tmp_path, capsys):
    path, run = tmp_path / "run.pt", Run(library)
    for loss in (3.0, 2.0, 1.0):
        run.history["loss"].append(loss)
        run.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert run.pick_up(path).history["loss"] == [3.0, 2.0]
    assert "the checkpoint before the last one is used: " in capsys.readouterr().out
    path.unlink()
    assert run.pick_up(path).history["loss"] == [3.0, 2.0] and os.listdir(tmp_path) == ["run.previous.pt"]
    library.previous_checkpoint(path).write_bytes(b"")
    assert run.pick_up(path).history["loss"] == [] and "training starts afresh: " in capsys.readouterr().out


plain = st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
numbers_of_numpy = st.floats(allow_nan=False, width=32).map(np.float32) | st.integers(0, 99).map(np.int64)


@hypothesis_settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.text(max_size=5), st.recursive(plain | numbers_of_numpy, lambda values: st.lists(values, max_size=3) | st.dictionaries(
    st.text(max_size=3), values, max_size=3), max_leaves=6), max_size=4))
def test_any_history_that_is_saved_can_be_read(library, tmp_path, history):
    run = Run(library)
    run.history = {**run.history, **history}
    run.save(tmp_path / "run.pt")
    assert library.read_checkpoint(tmp_path / "run.pt")["history"] == {**run.history}
    for bad in (object(), torch.zeros(2), {1, 2}):
        run.history["bad"] = bad
        with pytest.raises((TypeError, ValueError)):
            run.save(tmp_path / "run.pt")
    del run.history["bad"]
    assert library.read_checkpoint(tmp_path / "run.pt")["history"] == run.history, "what was there is untouched"


@hypothesis_settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 11), st.sampled_from([{}, dict(max_steps=20), dict(evaluations=5), dict(minutes=None), dict(max_steps=6)]),
       st.sampled_from(["muon", "adamw"]), st.integers(0, 99))
def test_a_run_goes_on_at_any_step_with_other_settings(library, tmp_path, step, changes, optimizer, seed):
    """Equal to the run that was never stopped but had the other settings from that step on."""
    path = tmp_path / "run.pt"
    begun = Run(library, optimizer=optimizer)
    with contextlib.suppress(ZeroDivisionError):
        library.train(begun.model, begun.optimizers, TOKENS, begun.settings, begun.history, begun.generator,
                      after_step=lambda history: 1 / (len(history["loss"]) - step))
    begun.save(path)
    begun.settings = library.dataclasses.replace(begun.settings, **changes)
    later = Run(library, seed=seed, optimizer=optimizer, **changes).pick_up(path)
    for run in (begun, later):
        torch.manual_seed(1)
        library.train(run.model, run.optimizers, TOKENS, run.settings, run.history, run.generator)
    assert same(begun.state(), later.state()) and len(later.history["loss"]) == max(step, later.settings.max_steps)
    if (changes.get("max_steps") or 12) > step:
        assert later.history["rate"][-1] == library.learning_rate(later.settings.max_steps - 1, later.settings.max_steps,
                                                                  later.settings.warmup_steps, later.settings.decay_fraction)


@pytest.mark.parametrize("count", [80, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_checkpoints_never_load_wrongly(library, tmp_path, count):
    rng, wrong, path = random.Random(0), 0, tmp_path / "run.pt"
    Run(library).train(path)
    good, expected = path.read_bytes(), library.read_checkpoint(path)
    for _ in range(count):
        data, at, kind = bytearray(good), rng.randrange(len(good)), rng.randrange(4)
        if kind < 2:                                        # a bit anywhere, or in the table of contents, at the end
            data[(at, -1 - at % 2000)[kind]] ^= 1 << rng.randrange(8)
        else:                                               # cut off, or a piece replaced
            data[at:(None, at + 20)[kind - 2]] = rng.randbytes(rng.randrange(9))
        path.write_bytes(data)
        try:
            assert same(library.read_checkpoint(path), expected)
        except ValueError as error:
            assert re.fullmatch(r".*run.pt is no whole checkpoint \(.*\), and nothing in it was run", str(error))
            wrong += 1
    assert wrong > count / 2


def test_a_token_file_of_another_length_is_made_again(library, tokenizer, tmp_path, capsys):
    texts, load = ["one two", "", "three"], lambda: library.load_tokens(tmp_path / "tokens", "stamp", texts, tokenizer)
    expected = load().copy()
    assert tokenizer.decode(expected.tolist()) == "".join(library.END_OF_TEXT + text for text in [*texts, ""])
    path, = (tmp_path / "tokens").iterdir()
    good = path.read_bytes()
    for bad in (good[:-1], good + b"x", b""):
        path.write_bytes(bad)
        assert np.array_equal(load(), expected) and "another length" in capsys.readouterr().out
    assert os.listdir(tmp_path / "tokens") == [path.name]


def test_a_loss_that_is_no_number_updates_nothing_and_names_the_last_checkpoint(library, tmp_path):
    def sabotage(run):
        if len(run.history["loss"]) == 5 and not before:
            run.model.final_norm.weight.data[0] = math.inf
            before.extend(p.clone() for p in run.model.parameters())
    before, run, path = [], Run(library, before_step=sabotage), tmp_path / "run.pt"
    with refused("^step 5: the loss is nan, .*nothing was updated. Try half the learning rate. Last checkpoint: that of "
                 "step 5$", FloatingPointError):
        run.train(path, save_every=0)
    assert len(run.history["loss"]) == 5 and same(before, list(run.model.parameters()))
    assert len(Run(library).pick_up(path).train(path).history["loss"]) == 12


def test_gradients_that_a_broken_step_left_do_not_count(library, tmp_path):
    run = Run(library)
    for p in run.model.parameters():
        p.grad = torch.full_like(p, math.nan)
    run.train(tmp_path / "run.pt")
    assert same(run.state(), Run(library).train(tmp_path / "other.pt").state())


def test_the_checkpoints_name_follows_the_code_but_not_its_comments(library):
    before, settings = load_library().definition_hashes(), library.make_settings("smoke")
    assert set(before) == set(library.DECISIVE) and len(set(before.values())) == len(before)
    for old, new, names in (("torch.relu(x).square()", "torch.relu(x)", {"relu_squared"}), ("x = x + self.attention(", "x = self.attention(", {"Block"}),
                            ('p.mul_(1 - lr * group["weight_decay"])', "pass", {"AdamW"}),
                            ("# (B, T + 1)", "# another comment", set()), ('"""max(x, 0)²."""', '"""Another docstring."""', set())):
        after = load_library([(old, new)]).definition_hashes()
        assert {name for name in before if before[name] != after[name]} == names
        assert (library.run_name(settings, "s", before) == library.run_name(settings, "s", after)) == (not names)
    longer = dataclasses.replace(settings, max_steps=9999, minutes=None, precision="float32", evaluations=1)
    assert library.run_name(settings, "s", {}) == library.run_name(longer, "s", {}) != library.run_name(settings, "other", {})
    linecache.clearcache()
    assert library.definition_hashes() == {}       # no source, as where definitions are typed into a terminal


def test_what_differs_from_before_is_said(library, tmp_path, capsys):
    settings = library.make_settings("smoke", checkpoint_dir=str(tmp_path), max_steps=12, context_length=16, n_embd=16, batch_size=2)
    run = Run(library)
    run.history["definitions"] = {"Block": "new", "GPT": "same"}
    library.save_checkpoint(tmp_path / "old.pt", run.model, run.optimizers, run.history, settings, MERGES, run.generator, "s")
    library.starting_history(settings, tmp_path / "new.pt", run.model, run.optimizers, run.generator, MERGES, "s", {"Block": "old", "GPT": "same"})
    assert capsys.readouterr().out == "old.pt is not used: it was trained with another definition of Block\n"
    run = Run(library).train(tmp_path / "run.pt")
    run.settings = dataclasses.replace(run.settings, max_steps=15)
    assert len(run.train(tmp_path / "run.pt").history["loss"]) == 15
    assert "max_steps was 12 until step 12, now it is 15" in capsys.readouterr().out
    library.set_dropout(run.model, 0.3)
    library.note_conditions(run.history, 15, torch.bfloat16, run.model)
    assert capsys.readouterr().out == ("precision was float32 until step 15, now it is bfloat16\n"
                                       "dropout was 0.1 until step 15, now it is 0.3\n")


def test_a_changed_setting_names_the_section_to_run_again(library):
    settings, need, sections_run = library.make_settings("smoke"), library.need, {}
    for section in (2, 4, 8, 9):
        with refused(f"^section {section} has not been run yet: run it first$", RuntimeError):
            need(sections_run, settings, 9)
        sections_run[section] = settings, "a" if section > 2 else None
    need(sections_run, dataclasses.replace(settings, samples=7, device="cpu", lab_seconds=9.0), 9)
    for name, value, section in (("corpus", "shakespeare", 2), ("vocab_size", 600, 4), ("pretrained", True, 4),
                                 ("n_layer", 3, 8), ("seed", 1, 8), ("max_steps", 9, 9)):
        changed = dataclasses.replace(settings, **{name: value})
        with refused(f"^{name} is now .* but section {section} was run with .*: run again from section {section} on$",
                     RuntimeError):
            need(sections_run, changed, 9)
        for last in (last for last in (2, 4, 8) if last < section):     # what does not depend on it
            need(sections_run, changed, last)
    with refused("^section 4 has made other tokens since section 8 was run: run again from section 8 on$", RuntimeError):
        need({**sections_run, 4: (settings, "b")}, settings, 9)


def test_a_section_without_those_before_it_is_one_sentence(library):
    for section in (4, 8, 9, 10, 11, 12, 13, 14):
        cells = [source for source, tags in cells_of_sections(section, section) if not tags and "need(" in source]
        assert cells, section
        for source in cells:
            with refused("^section 2 has not been run yet: run it first$", RuntimeError):
                exec(source, {**vars(library), "sections_run": {}, "settings": library.make_settings("smoke")})


def test_a_second_notebook_is_told_before_its_first_step(library, tmp_path):
    path, run = tmp_path / "new" / "run.pt", Run(library)
    with library.locked(path), refused("^another notebook is training this very run .*; wait until", RuntimeError):
        run.train(path)
    assert run.history["loss"] == [] and not path.exists()
    run.train(path)                                         # the first has finished
    late = Run(library)                                     # it looked for a checkpoint before there was one
    with refused("^another notebook has trained this very run meanwhile .*run the cell above again", RuntimeError):
        late.train(path)
    assert late.history["loss"] == [] and len(late.pick_up(path).train(path).history["loss"]) == 12


def test_a_run_can_be_made_anew(library, tmp_path):
    path = tmp_path / "run.pt"
    Run(library).train(path)
    anew = Run(library, reuse_checkpoint=False, max_steps=5).pick_up(path)
    assert anew.history["loss"] == [] and len(anew.train(path).history["loss"]) == 5
    assert len(library.read_checkpoint(path)["history"]["loss"]) == 5


def test_a_device_that_is_not_there(library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert library.choose_device(library.make_settings("smoke", device="auto")) == torch.device("cpu")
    with refused("^device is 'cuda', but it must be one of: cpu$"):
        library.choose_device(library.make_settings("smoke", device="cuda"))


BAD = {"make_settings": [
    dict(n_embd=100), dict(n_embd=6, n_head=2), dict(vocab_size=100), dict(vocab_size=512.0), dict(corpus="no file"),
    dict(corpus=""), dict(corpus=r"C:\Users\me\texts"), dict(corpus="python "), dict(corpus=3), dict(position="rotari"),
    dict(position=None), dict(dropout=1.0), dict(dropout="0.1"), dict(learning_rate=math.nan), dict(learning_rate=0),
    dict(max_steps="100"), dict(max_steps=True), dict(qk_norm=1), dict(n_layer=0), dict(evaluations=0), dict(device="gpu"),
    dict(held_out_fraction=0.5), dict(no_such_setting=1)], "GPTConfig": [
    dict(n_embd=100), dict(n_layer=-1), dict(norm="batchnorm"), dict(activation=3), dict(vocab_size=0), dict(bias="yes"),
    dict(context_length=1), dict(dropout=math.inf), dict(n_embd=12, n_head=4, position="rotary")]}


@pytest.mark.parametrize("maker, changes", [(maker, changes) for maker in BAD for changes in BAD[maker]], ids=str)
def test_bad_settings_and_architectures(library, maker, changes):
    with refused(rf"^{next(iter(changes))}\b.* is "):
        getattr(library, maker)(**changes)


def test_an_unknown_preset(library):
    with refused("^preset is 'huge', but it must be one of: smoke"):
        library.make_settings("huge")


def documents_of(library, name):
    return library.load_documents(library.make_settings("smoke", corpus=str(name), data_dir=str(name.parent / "data")))


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "holds no text"), ("a.png", b"x", "existing files of type .txt"), ("a.txt", b"\x89PNG\r\n\x00\xff", "holds no text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": ', "holds no text"), ("a.jsonl", b'{"title": "a", "body": "b"}\n', "no column 'text', but only title, body"),
    ("a.jsonl", b'{"text": 3}\n', "holds no text"), ("a.jsonl", b"", "holds no text"), ("a.csv", b"story\nx\n", "but only story; choose"),
    ("a.jsonl", b'{"text": null}\n', "holds no text"), ("a.jsonl", b"\n", ""), ("a.txt.gz", b"no gzip", "holds no text"),
    ("a.parquet", b"PAR1 no parquet", "holds no text"), ("a.parquet", b"", "holds no text")])
def test_bad_files(library, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with refused(rf"^corpus(?=.*{name}').*{words}"):
        documents_of(library, tmp_path / name)


@pytest.mark.parametrize("content, changes, words", [
    (b" \n\n", {}, "corpus leaves no document of 60 to 4000 bytes"), (b"x", {}, "corpus leaves no document"),
    (b"one document " * 9, {}, "corpus leaves the (train|validation|test) set empty"),
    (b"a document " * 9, dict(min_document_bytes=500, max_document_bytes=100), "corpus leaves no document of 500 to")])
def test_files_with_too_little_text(library, tmp_path, content, changes, words):
    (tmp_path / "a.txt").write_bytes(content)
    space = {**vars(library), "need": lambda *_: None, "sections_run": {}, "settings": library.make_settings(**changes),
             "documents": documents_of(library, tmp_path / "a.txt")}
    with refused(f"^{words}"):
        for source in [source for source, tags in cells_of_sections(4, 4) if not tags][:2]:
            exec(source, space)


def test_files_and_folders_that_may_not_be_read_or_written(library, tmp_path, monkeypatch, capsys):
    for name in ("data", "secret.txt"):
        (tmp_path / name).write_text("some text")
    folder = library.writable_folder(str(tmp_path / "data"))       # there it is a file
    assert os.listdir(folder) == [] and re.match(r".*data can't be written to \(.*exists\): data go to a temporary", capsys.readouterr().out)
    assert library.writable_folder(str(tmp_path / "new" / "folder")) == str(tmp_path / "new" / "folder") and not capsys.readouterr().out
    monkeypatch.setattr(library, "decoded_blocks", lambda path: open("/no_such"))
    assert list(library.read_own_files(str(tmp_path / "secret.txt"), "text")) == []
    assert re.search(r"^passed over: .*secret.txt \(.*No such file", capsys.readouterr().out)


def test_texts_of_ones_own_come_whole_and_clean(library, tmp_path):
    rng = random.Random(0)
    for _ in range(200):
        parts = ["word ", "\n", "\n\n", "x" * rng.randrange(1, 90), "\t"]
        text = "".join(rng.choices(parts, k=rng.randrange(60)))
        blocks = [text[i:i + 7] for i in range(0, len(text), 7)]
        pieces = list(library.passages(blocks, size=20))
        assert "".join(pieces) == text and all(len(piece.encode()) <= 20 for piece in pieces)
    (tmp_path / "nul.txt").write_bytes(b"one\x00two\r\nthree  \n")
    row = library.normalise(documents_of(library, tmp_path / "nul.txt")[0])
    assert row == {"text": "onetwo\nthree", "bytes": 12} and library.normalise({"text": "a\ud800b"})["text"] == "a?b"


PROSE = "The north wind and the sun disputed who was the stronger of the two, and a traveller came along. "
KEPT = {  # name: (content, characters of it that are kept)
    "english.txt": (f"{PROSE * 24}\n".encode() * 20, len(PROSE) * 480), "russian.txt": (("Северный ветер и солнце спорили. " * 60 + "\n").encode() * 20, 33 * 1200),
    "chinese.md": (("北风和太阳争论谁更强。" * 30 + "\n").encode() * 30, 11 * 900), "BOOK.TXT": (PROSE.encode() * 9, len(PROSE) * 9),
    "latin.text": ("Señor, ¿dónde está? ".encode("latin-1") * 50, 1000), "windows.txt": (PROSE.encode("utf-16") * 9, len(PROSE) * 9),
    "crlf.markdown": (b"\xef\xbb\xbf" + b"one line\r\n" * 90, 9 * 90), "zipped.txt.gz": (gzip.compress(PROSE.encode() * 9), len(PROSE) * 9),
    "list.json": (json.dumps([{"text": PROSE}, {"text": None}, {"text": PROSE}]).encode(), len(PROSE) * 2),
    "table.csv": (b"text,n\n" + PROSE.replace(",", "").encode() + b",1\n", len(PROSE) - 1), "notes [1].txt": (PROSE.encode() * 9, len(PROSE) * 9)}


@pytest.mark.parametrize("name", KEPT)
def test_nine_tenths_of_a_text_are_used(library, tmp_path, name):
    content, characters = KEPT[name]
    folder = tmp_path / "old [2024] texts"
    folder.mkdir()
    (folder / name).write_bytes(content)
    (folder / "picture.png").write_bytes(b"x")
    for corpus in (folder, folder / name):
        texts = [library.normalise(row)["text"] for row in library.read_own_files(str(corpus), "text")]
        used = [text for text in texts if 60 <= len(text.encode()) <= 4000]
        assert 0.9 * characters <= sum(map(len, used)) <= 1.01 * characters, (len(used), sum(map(len, used)), characters)


def test_files_of_other_types_do_not_decide_how_a_book_is_split(library, tmp_path):
    (tmp_path / "book.txt").write_text(f"{PROSE}\n\n" * 3000)
    alone = list(library.read_own_files(str(tmp_path), "text"))
    for i in range(25):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    assert list(library.read_own_files(str(tmp_path), "text")) == alone and len({row["source"] for row in alone}) > 10


def test_a_document_larger_than_the_limit_is_read_and_nothing_after_it(library, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text * 2000}) + "\n" for text in "ab"))
    rows = list(library.read_corpus(str(tmp_path / "rows.jsonl"), "text", 0.001))
    assert [row["text"] for row in rows] == ["a" * 2000]


def test_the_stamp_of_the_data_tells_where_a_set_ends(library, tokenizer):
    stamps = {library.data_stamp(library.make_settings(), tokenizer, {"test": texts[:n], "train": texts[n:]})
              for texts in (["a", "b", "c"], ["a", "c", "b"]) for n in (1, 2)}
    assert len(stamps) == 4


def test_own_files_are_found_once_and_named_by_their_text(library, tmp_path):
    for name, text in (("a.txt", "first"), ("sub/b.txt", "second"), ("c.jpg", "no text")):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(text)
    try:
        (tmp_path / "here" / "sub" / "loop").symlink_to(tmp_path / "here", target_is_directory=True)
        (tmp_path / "here" / "again.txt").symlink_to("a.txt")
    except OSError:
        pass                                                                          # Windows may forbid links
    shutil.copytree(tmp_path / "here", tmp_path / "there", symlinks=True)
    found = [sorted((row["text"], row["source"]) for row in library.read_own_files(str(place), "text"))
             for place in (tmp_path / "here", tmp_path / "there", tmp_path / "here" / "**" / "*.txt")]
    assert found[0] == found[1] == found[2] and [text for text, _ in found[0]] == ["first", "second"]
    settings = library.make_settings(corpus=str(tmp_path / "here"), data_dir=str(tmp_path / "data"))
    assert len(library.load_documents(settings)) == 2


@given(st.lists(st.integers(1, 400), min_size=3, max_size=40), st.sampled_from([0.02, 0.06, 0.2]), st.integers(0, 99))
def test_held_out_sets_get_their_share_by_size(library, sizes, fraction, seed):
    sources = [f"{seed} {i}" for i in range(len(sizes))]
    sides = library.sides_by_size(sources, sizes, fraction)
    assert library.sides_by_size(sources[::-1], sizes[::-1], fraction) == sides[::-1]
    for name in ("validation", "test"):
        share = sum(size for size, side in zip(sizes, sides) if side == name) / sum(sizes)
        assert share > 0
        if max(sizes) <= fraction * sum(sizes) / 4 or len(sizes) * fraction > 4 and max(sizes) <= 2 * min(sizes):
            assert 0.5 * fraction <= share <= 1.5 * fraction
    assert "train" in sides


def test_a_file_in_one_line_is_read_in_bounded_memory(library, tmp_path):
    (tmp_path / "line.txt").write_bytes(b"all in one line " * 1_000_000)
    tracemalloc.start()
    rows = sum(1 for _ in itertools.islice(library.read_own_files(str(tmp_path / "line.txt"), "text"), 2000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 2000 and peak < 4_000_000


def test_any_prompt_works_and_is_text(library, tokenizer):
    model = library.GPT(referees.small_config(library, vocab_size=tokenizer.n_vocab))
    for prompt in ("", "x" * 100_000, "🎉🎉", "<|endoftext|>", "a\ud800b", "\x00"):
        ids = library.encode_prompt(tokenizer, prompt)
        assert [i for i, token in enumerate(ids) if token == tokenizer.eot_token] == [0]
        library.generate(model, tokenizer, prompt, 3, seed=0)


@pytest.mark.parametrize("options", [
    dict(prompt=None), dict(samples=0), dict(max_new_tokens=-1), dict(max_new_tokens=2.5), dict(seed=-1), dict(seed="x"),
    dict(temperature=-0.5), dict(temperature=math.nan), dict(temperature=math.inf), dict(temperature=True),
    dict(top_k=0), dict(top_k=1.5), dict(top_p=0.0), dict(top_p=1.01), dict(top_p="1"), dict(min_p=0)], ids=str)
def test_bad_options_of_sampling(library, tokenizer, options):
    model = library.GPT(referees.small_config(library, vocab_size=tokenizer.n_vocab))
    with refused(f"^{next(iter(options))} is .*, but it must be "):
        library.generate(model, tokenizer, **{"prompt": "x", "max_new_tokens": 2, **options})

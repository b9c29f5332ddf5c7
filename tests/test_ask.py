"""Asking a model: what is asked, of whom, how it is shown; the console."""

import io

import pytest

import ask
import train_upt
from ask import Answered, Config
from upt.data import decode, shapes
from upt.errors import DataError, PolicyError, SettingError, UserError


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run whose adapter changes what the model says."""
    folder = tmp_path_factory.mktemp("ask") / "run"
    settings = {"steps": 2, "questions_per_step": 2, "group_size": 4, "max_new_tokens": 6, "learning_rate": 0.3}
    settings |= {"reward": "random", "eval_questions": 3, "eval_samples": 2, "seed": 0, "kl_coef": 0.0}
    train_upt.main(train_upt.Config(model=tiny, out=folder, device="cpu", **settings))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, question in enumerate(shapes.questions("test", 0, 2)):
        question.image.save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_base_and_trained_answer_as_the_run_was_scored(run, pictures, capsys):
    import json

    question = shapes.questions("test", 0, 1)[0].question
    (found,) = ask.main(Config(question=question, run=run, image=pictures / "0.png", samples=3, device="cpu"))
    for name, file in (("base", "before"), ("trained", "after")):
        row = json.loads((run / f"{file}.json").read_text())["rows"][0]
        assert found[name].greedy == row["responses"][0]["text"]
        assert len(found[name].samples) == 3 and sum(count for _, count in found[name].votes) == 3
    assert found["base"].greedy != found["trained"].greedy
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"0.png: {question}" and lines[0].split() == ["base", "|", "trained"]


def test_a_folder_options_and_a_model_alone(tiny, pictures):
    found = ask.main(Config(question="Which?", model=tiny, image=pictures, samples=2, choice=("3", "4"), device="cpu"))
    assert len(found) == 2 and [*found[0]] == ["model"]
    (blind,) = ask.main(Config(question="2 + 2?", model=tiny, samples=2, device="cpu"))
    assert len(blind["model"].samples) == 2


def test_a_pipe_is_answered_line_by_line_and_goes_on_after_a_mistake(tiny, pictures, monkeypatch, capsys):
    said = f"What?\n/image nowhere.png\nAnd now?\n\n \n/image {pictures / '1.png'}\nThere?\n/image\n2 + 2?\n"
    said += "/help me\n/quit\nno\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    found = ask.main(Config(model=tiny, image=pictures / "0.png", samples=2, device="cpu"))
    shown = capsys.readouterr()
    heads = [line for line in shown.out.splitlines() if line.endswith("?")]
    assert heads == ["0.png: What?", "0.png: And now?", "1.png: There?", "no picture: 2 + 2?"] and len(found) == 4
    assert shown.err.splitlines() == [
        "error: nowhere.png: no such file; give a picture or a folder of pictures",
        "error: /help: no such command; /image PATH takes another picture, /quit ends",
    ]
    assert "? 0.png" not in shown.out and "ask; " not in shown.err


def test_a_pipe_of_which_nothing_is_answered(tiny, monkeypatch, capsys):
    for said in ("", "/image nowhere.png\n\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        with pytest.raises(DataError, match="no question was answered: give one"):
            ask.main(Config(model=tiny, samples=2, device="cpu"))


def test_what_is_no_utf_8_is_a_mistake_in_its_line_alone(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Wie gro\xdf?\n2 + 2?\n"), encoding="utf-8"))
    assert len(ask.main(Config(model=tiny, samples=2, device="cpu"))) == 1
    said = "is not UTF-8: convert it, as by iconv"
    assert said in capsys.readouterr().err
    with pytest.raises(DataError, match=said):
        ask.main(Config(question="Which?", choice=("a", "\udcdf"), model=tiny, samples=2, device="cpu"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
@pytest.mark.parametrize(("image", "which"), [("0.png", "another picture"), (None, "a picture")])
def test_the_console_ends_cleanly(tiny, pictures, monkeypatch, capsys, end, image, which):
    typed, prompts = iter(["What?"]), []

    def answer(prompt):
        prompts.append(prompt)
        if (line := next(typed, None)) is None:
            raise end
        return line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    found = ask.main(Config(model=tiny, image=image and pictures / image, samples=2, device="cpu"))
    assert len(found) == 1 and prompts == ["? ", "? "]
    assert capsys.readouterr().err == f"ask; /image PATH takes {which}; an empty line ends\n\n"


def test_what_cannot_be_read_of_a_folder_is_left_out(tiny, pictures, tmp_path, monkeypatch, capsys):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes())
    (tmp_path / "-0.png").write_bytes(b"GIF")
    read = []
    monkeypatch.setattr("ask.decode", lambda name, content: read.append(name) or decode(name, content))
    found = ask.main(Config(question="What?", model=tiny, image=tmp_path, samples=2, device="cpu"))
    shown = capsys.readouterr()
    assert len(found) == 2 and [line for line in shown.out.splitlines() if line.endswith("?")] == [
        "0.png: What?", "1.png: What?",
    ]  # fmt: skip
    assert shown.err.count("left out: ") == 1 and "-0.png: not an image" in shown.err
    assert read == ["-0.png", "0.png"] + ["-0.png", "0.png", "1.png"]  # looked for one that can be read, then asked
    with pytest.raises(DataError, match="the question can be asked about none of 3 pictures"):
        long = "how " * 900
        ask.main(Config(question=long, model=tiny, image=tmp_path, samples=2, device="cpu"))


def test_answers_stand_beside_each_other():
    said = {
        "base": Answered("one two three four five", ["a"] * 3, [("4", 2), (None, 1)]),
        "trained": Answered("six", ["b"] * 3, [("5", 3)]),
    }
    assert ask.shown(said, 43).splitlines() == [
        "base                 | trained",
        "one two three four   | six",
        "five                 | 3 samples: 3 × 5",
        "3 samples: 2 × 4, 1  |",
        "× no answer          |",
    ]
    hostile = {"model": Answered("\x1b]0;taken\x07", ["a"], [("\x1b[2J", 1)])}
    assert "\x1b" not in ask.shown(hostile, 60) and "\\x1b[2J" in ask.shown(hostile, 60)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"image": "nowhere.png"}, DataError, "nowhere.png: no such file"),
        ({"choice": ("3",)}, SettingError, "--choice is given once"),
        ({"run": "nowhere"}, UserError, "no run of train_upt.py there"),
        ({"samples": 0}, SettingError, "--samples"),
    ],
)
def test_mistakes_are_said_before_a_model_is_loaded(tiny, monkeypatch, settings, error, message):
    monkeypatch.setattr("upt.run.trained.load_policy", lambda *_, **__: pytest.fail("loaded"))
    for question in ("?", None):  # on the console, too
        given = ({} if "run" in settings else {"model": tiny}) | settings
        with pytest.raises(error, match=message):
            ask.main(Config(question=question, device="cpu", **given))


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PolicyError, match=f"it is an adapter, so give its base as --model, and --adapter {tmp_path}"):
        ask.main(Config(question="?", model=str(tmp_path), device="cpu"))


def test_wide_characters_and_escapes_keep_the_columns_apart():
    said = {
        "base": Answered("答案是三个红色的形状，因为有三个", ["a"], [("三", 1)]),
        "trained": Answered("\x1b[2J\x1b[2J\x1b[2J e\u0301e\u0301", ["b"], [("5", 1)]),
    }
    lines = ask.shown(said, 43).splitlines()
    assert {ask.width_of(line.partition(" | ")[0]) for line in lines if " | " in line} == {20}
    assert lines[1].startswith("答案是三个红色的形状 | \\x1b[2J") and ask.width_of("形e\u0301") == 3
    assert ask.folded("a" * 25 + " b", 20) == ["a" * 20, "aaaaa b"] and ask.folded("", 20) == [""]
    assert ask.folded("one two", 3) == ["one", "two"]


def test_what_is_no_picture(tiny, tmp_path):
    (tmp_path / "x.png").write_bytes(b"GIF")
    with pytest.raises(DataError, match="x.png: .*give another picture"):
        ask.main(Config(question="?", model=tiny, image=tmp_path / "x.png", device="cpu"))
    with pytest.raises(DataError, match="none of 1 pictures can be read: .*x.png: .*give another picture"):
        ask.main(Config(question="?", model=tiny, image=tmp_path, device="cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no pictures in this folder"):
        ask.main(Config(question="?", model=tiny, image=tmp_path / "empty", device="cpu"))

"""Asking a model a benchmark's questions: which are asked and how, resuming, following a benchmark in training."""

import io
import json
from pathlib import Path

import huggingface_hub.constants
import pytest
from PIL import Image

import data
import train_upt
from eval import extractor, follow, run, score
from eval.benchmark import benchmark, folder_of
from policy import Policy
from tests.hubcache import make_hub_dataset

VISION = benchmark("mathvision")


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60), colour).save(buffer, "PNG")
    return buffer.getvalue()


def vision(uid: str, answer: str = "5", options: tuple = (), **other) -> dict:
    row = {"id": uid, "question": f"How many are {uid}? <image1>", "options": list(options), "answer": answer}
    return row | {"image": f"images/{uid}.png", "level": 1, "subject": "counting"} | other


def vision_folder(folder: Path, pictures: int = 3, questions: int = 3) -> Path:
    """testmini.jsonl with its pictures, test.jsonl with twice as many questions."""
    (folder / "images").mkdir(parents=True)
    for n in range(pictures):
        (folder / f"images/{n}.png").write_bytes(png())
    lines = [json.dumps(vision(str(n))) + "\n" for n in range(2 * questions)]
    (folder / "testmini.jsonl").write_text("".join(lines[:questions]))
    (folder / "test.jsonl").write_text("".join(lines))
    return folder


def config(folder: Path, out: Path, model: str, **changed) -> run.Config:
    given = {"benchmark": "mathvision", "max_new_tokens": 6, "device": "cpu"} | changed
    return run.Config(data=str(folder), out=out, model=model, **given)


def responses(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------- questions


def test_the_largest_split_with_all_pictures_is_asked(tmp_path):
    folder = vision_folder(tmp_path / "a")
    assert [q.id for q in run.select(VISION, folder)] == ["0", "1", "2"]
    assert [q.id for q in run.select(VISION, folder, limit=2)] == ["0", "1"]
    assert len(run.select(VISION, folder, "test")) == 6
    for n in range(3, 6):
        (folder / f"images/{n}.png").write_bytes(png())
    assert len(run.select(VISION, folder)) == 6
    few = vision_folder(tmp_path / "b", pictures=2)
    assert len(run.select(VISION, few)) in (3, 6)  # none is complete, both have two
    with pytest.raises(ValueError, match="has no train among its files of questions, which are test, testmini"):
        run.select(VISION, folder, "train")
    with pytest.raises(FileNotFoundError, match="none of its pictures: images/0.png is expected"):
        run.select(VISION, vision_folder(tmp_path / "c", pictures=0))


def test_variants_are_asked_together(tmp_path):
    row = {"question": "?", "answer": "1", "image": "", "answer_type": "float", "subject": "x", "level": "y"}
    for variant in (1, 2, 10):
        (tmp_path / f"dataset{variant}.json").write_text(json.dumps({str(seed): row for seed in (1, 2, 11)}))
    found = run.select(benchmark("dynamath"), tmp_path, limit=7)
    assert [q.id for q in found] == ["1/1", "1/2", "1/10", "2/1", "2/2", "2/10", "11/1"]


def test_how_a_question_is_asked(tmp_path):
    folder = vision_folder(tmp_path)
    (folder / "testmini.jsonl").write_text(json.dumps(vision("0", "B", ("5", "7"))))
    question = run.select(VISION, folder, "testmini")[0]
    asked = run.ask(VISION, folder, question, "boxed")
    assert (asked.question, asked.choices, asked.image.size) == ("How many are 0?", ["5", "7"], (60, 60))
    official = run.ask(VISION, folder, question, "official")
    assert official.choices is None and official.question.endswith("How many are 0? \n(A) 5\n(B) 7")
    assert "\\boxed{}" in official.question and run.template("official") == "{question}"
    verse = {
        "sample_index": "1", "problem_index": "1", "problem_version": "Vision Only", "question": "", "answer": "B",
        "image": "0.png", "question_type": "multi-choice", "metadata": {"subject": "s", "subfield": "f"},
        "query_cot": "Reason, then give the letter.",
    }  # fmt: skip
    (folder / "testmini.json").write_text(json.dumps([verse]))
    bench = benchmark("mathverse")
    question = bench.by_id(folder)["1"]  # its picture lies under images/, which its path leaves out
    assert run.ask(bench, folder, question, "official").question == "Reason, then give the letter."
    assert run.ask(bench, folder, question, "boxed").question == "Answer the question in the picture."
    text = question._replace(text="Find x.\nChoices:\nA:1\nB:2", choices=("1", "2"), image="")
    asked = run.ask(bench, folder, text, "boxed")
    assert asked.choices is None and asked.image is None  # the text has its choices already


@pytest.mark.parametrize("image", ["images/9.png", "/etc/hostname", "../a/images/0.png", "images/broken.png"])
def test_a_picture_that_cannot_be_used(tmp_path, image):
    folder = vision_folder(tmp_path / "a")
    (folder / "images/broken.png").write_bytes(b"no picture")
    question = run.select(VISION, folder)[0]._replace(image=image)
    with pytest.raises(data.BadRow, match="missing image file|not an image"):
        run.ask(VISION, folder, question, "boxed")


def test_a_hub_data_set_from_the_cache(tmp_path, monkeypatch, tiny):
    rows = [vision(str(n), image=png()) for n in range(2)]
    make_hub_dataset(tmp_path / "hub", "MathLLMs/MathVision", {"test": rows})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    question = run.select(VISION, folder_of("MathLLMs/MathVision"), "test")[1]
    assert question.id == "1" and run.ask(VISION, tmp_path, question, "boxed").image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="hf download --repo-type dataset no/such"):
        folder_of("no/such")
    with pytest.raises(ValueError, match="there is no folder nowhere: give the benchmark's data folder"):
        folder_of("nowhere")


# -------------------------------------------------------------------------------------------------------- responses


def test_one_benchmark_end_to_end_and_again(tmp_path, tiny, capsys, monkeypatch):
    folder, out = vision_folder(tmp_path / "data"), tmp_path / "out"
    settings = config(folder, out, tiny, n=2, temperature=1.0)
    result = run.main(settings)
    rows = responses(out)
    assert [(r["id"], r["sample"]) for r in rows] == [(str(n), g) for n in range(3) for g in range(2)]
    assert rows[0]["response"] != rows[1]["response"] and all(1 <= r["tokens"] <= 6 for r in rows)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result and result["n"] == 6
    summary = json.loads((out / "scores.summary.json").read_text())
    made = summary["responses"]
    assert made["config"]["prompt"] == "think-boxed" and made["config"]["temperature"] == 1.0
    assert made["config"]["pixels"] == {"min_pixels": 56 * 56, "max_pixels": 280 * 280}
    assert made["model"]["fingerprint"].startswith("sha256:") and "torch" in summary["versions"]
    assert (summary["extractor"], summary["metrics"]) == ("rules", {})

    whole = (out / "responses.jsonl").read_text().splitlines(keepends=True)
    (out / "responses.jsonl").write_text("".join(whole[:3]) + whole[3][:20])  # killed within question 1
    assert run.main(settings) == result and responses(out) == rows
    monkeypatch.setattr(run, "respond", None)  # nothing is left to ask
    assert run.main(config(folder, out, tiny, n=2, temperature=1.0, protocol="ours"))["protocol"] == "ours"
    assert responses(out) == rows
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        run.main(config(folder, out, tiny, n=2, temperature=1.0, seed=1))


def test_all_of_a_root_names_what_is_missing(tmp_path, tiny, capsys):
    vision_folder(tmp_path / "root/mathvision")
    vision_folder(tmp_path / "root/wemath")  # not We-Math's layout
    row = {"question": "?", "answer": "1", "image": "", "answer_type": "float", "subject": "x", "level": "y"}
    (tmp_path / "root/dynamath").mkdir()
    (tmp_path / "root/dynamath/dataset.json").write_text(json.dumps({"1": row}))  # in text alone
    settings = config(tmp_path / "root", tmp_path / "out", tiny, benchmark="all", limit=2)
    result = run.main(settings)
    assert {name: found["n"] for name, found in result["benchmarks"].items()} == {"mathvision": 2, "dynamath": 1}
    assert set(result["missing"]) == {"mathverse", "mathvista", "wemath", "logicvista"}
    assert (
        "there is no folder" in result["missing"]["mathvista"] and "has no testmini.json" in result["missing"]["wemath"]
    )
    printed = capsys.readouterr().out
    assert "| MATH-Vision | 2 | " in printed and "| DynaMath | 1 | 0.00 | average 0.00, worst 0.00 |" in printed
    assert printed.count("| benchmark |") == 1 and "not run: logicvista" in printed
    assert json.loads((tmp_path / "out/summary.json").read_text()) == result
    with pytest.raises(ValueError, match="no benchmark can run from"):
        run.main(config(tmp_path, tmp_path / "o", tiny, benchmark="all"))


def test_a_long_prompt_counts_as_wrong_and_a_lost_picture_is_left_out(tmp_path, tiny, capsys):
    folder = vision_folder(tmp_path / "data", pictures=2)
    lines = [json.dumps(vision("0")), json.dumps(vision("1", question="word " * 400)), json.dumps(vision("2"))]
    (folder / "testmini.jsonl").write_text("\n".join(lines))
    run.main(config(folder, tmp_path / "out", tiny, split="testmini", max_prompt_tokens=300))
    rows = responses(tmp_path / "out")
    assert [r["id"] for r in rows] == ["0", "1"] and (rows[1]["response"], rows[1]["tokens"]) == ("", 0)
    said = capsys.readouterr().err
    assert "1: prompt of" in said and "left out 2: missing image file: images/2.png" in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 2}, "--n 2 at temperature 0 gives the same response"),
        ({"limit": 0}, "--n and --limit must be at least 1"),
        ({"prompt": "nothing"}, "no prompt 'nothing'"),
        ({"temperature": -1.0}, "sampling needs temperature >= 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, tiny, changed, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, tmp_path, tiny, **changed).resolve()


def test_prompts_go_by_name(tmp_path, tiny):
    names = {"official": "official", "mm-upt": "boxed", "self-judge": "think-boxed", None: "think-boxed"}
    for given, style in names.items():
        assert config(tmp_path, tmp_path, tiny, prompt=given).resolve().prompt == style


# -------------------------------------------------------------------------------------------- a model as extractor


def test_a_model_reads_what_the_rules_cannot(tmp_path, monkeypatch):
    folder = vision_folder(tmp_path / "data")
    path = tmp_path / "a.jsonl"
    texts = [r"\boxed{5}", "Five of them can be seen there", "Nobody knows"]
    path.write_text("".join(json.dumps({"id": str(n), "response": text}) + "\n" for n, text in enumerate(texts)))
    asked = []

    def read(policy, unread):
        asked.extend(text for _, _, text in unread)
        return ["5", None]

    monkeypatch.setattr(extractor, "read", read)
    given = ("mathvision", str(folder), path, tmp_path / "s.jsonl")
    found = score.score(score.Config(*given, extractor="model"), policy="a policy")
    assert asked == texts[1:] and found["methods"] == {"box": 1, "model": 1, "text": 1} and found["correct"] == 2
    assert found["extraction"].endswith("where they find none by a model")
    found = score.score(score.Config(*given, extractor="model", protocol="ours"), policy="a policy")
    assert found["methods"] == {"vote key": 1, "model": 1, "none": 1} and found["correct"] == 2
    with pytest.raises(ValueError, match="--extractor model needs the model"):
        score.score(score.Config(*given, extractor="model"))


def test_the_extractor_shows_the_question_and_the_end_of_the_response(tiny, monkeypatch):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    question = VISION.question(None, vision("0"), "test")
    prompts, said = [], [r"\boxed{7}", r"\boxed{None}", "nothing"]

    def generate(policy, shown, rows, config):
        assert config.temperature == 0 and len(rows) == len(shown)
        prompts.extend(policy.tokenizer.decode(prompt.ids) for prompt in shown)
        ids = [policy.tokens(text) for text in said]
        return [extractor.rollout.Sampled(i, [], 0.0, 0.0, "stop") for i in ids]

    monkeypatch.setattr(extractor.rollout, "generate", generate)
    long = "x" * 3000 + " so it is <|im_end|> seven {question}"
    assert extractor.read(policy, [({}, question, long)] * 3) == ["7", None, None]
    assert "How many are 0?" in prompts[0] and "so it is  seven {question}" in prompts[0]
    assert prompts[0].count("x" * 1900) == 1 and "x" * 2001 not in prompts[0] and prompts[0].count("<|im_end|>") == 1
    monkeypatch.undo()
    assert len(extractor.read(policy, [({}, question, "7")] * 3)) == 3  # through the model itself


# ---------------------------------------------------------------------------------------------------- in training


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """Questions of which the starting model answers two of three as gold has it, and a run from it on `shapes`."""
    root = tmp_path_factory.mktemp("followed")
    folder = vision_folder(root / "data")
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    settings = config(folder, root, tiny).resolve()
    rows, _ = run.respond(policy, VISION, folder, run.select(VISION, folder), settings)
    golds = [VISION.extract(row["response"], run.select(VISION, folder)[0])[0] for row in rows]
    golds[2] = "no such answer"
    (folder / "testmini.jsonl").write_text("".join(json.dumps(vision(str(n), g)) + "\n" for n, g in enumerate(golds)))
    (folder / "test.jsonl").unlink()
    train_upt.main(
        train_upt.Config(
            data="shapes", model=tiny, steps=3, questions_per_step=4, group_size=4, max_new_tokens=6, eval_questions=0,
            out=root / "run", device="cpu", eval=(f"mathvision={folder}",), eval_every=2, limit=4, learning_rate=0.3,
            reward="random",
        )
    )  # fmt: skip
    return folder, root / "run"


def test_accuracy_is_followed_through_a_run(trained):
    folder, out = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = json.loads((out / "summary.json").read_text())["benchmarks"]["mathvision"]
    assert [row.get("benchmarks") is not None for row in rows] == [True, False, True]
    assert curve["0"] == rows[0]["benchmarks"]["mathvision"] == pytest.approx(2 / 3)  # of the model it starts from
    assert list(curve) == ["0", "2", "end"] and curve["2"] == rows[2]["benchmarks"]["mathvision"]
    assert curve["2"] < curve["0"]  # random rewards at a wild learning rate


def test_a_runs_own_model_is_evaluated(trained, tmp_path):
    folder, out = trained
    settings = run.Config(benchmark="mathvision", data=str(folder), run=out, out=tmp_path / "o", device="cpu")
    curve = json.loads((out / "summary.json").read_text())["benchmarks"]["mathvision"]
    assert run.main(settings)["accuracy"] == pytest.approx(curve["end"])
    made = json.loads((tmp_path / "o/manifest.json").read_text())
    assert made["adapter"]["name"] == str(out / "adapter") and made["config"]["max_new_tokens"] == 6
    with pytest.raises(ValueError, match="--run brings its own model and adapter"):
        config(folder, tmp_path, "x", run=out).resolve()
    (tmp_path / "manifest.json").write_text((out / "manifest.json").read_text())
    with pytest.raises(ValueError, match="has no adapter yet"):
        run.Config(data=str(folder), run=tmp_path).resolve()


def test_what_cannot_be_followed(tmp_path):
    for spec in ("mathvision", "mathvision=", f"other={tmp_path}"):
        with pytest.raises(ValueError, match="give NAME=FOLDER, NAME being one of mathvision"):
            follow.Followed([spec], 4)
    folder = vision_folder(tmp_path / "a")
    with pytest.raises(ValueError, match="names mathvision twice"):
        follow.Followed([f"mathvision={folder}"] * 2, 4)
    with pytest.raises(ValueError, match="give both or neither"):
        train_upt.Config(data="shapes", model="models/tiny", eval=("mathvision=x",)).resolve()

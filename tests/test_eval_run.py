"""Asking a model a benchmark's questions: which are asked and how, resuming, following a benchmark in training."""

import io
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pyarrow.parquet
import pytest
from PIL import Image

import train_upt
from eval import extractor, follow, run, score
from eval.benchmark import Question, benchmark, folder_of
from tests.hubcache import make_hub_dataset
from upt import data
from upt.groups import shards
from upt.model.policy import Policy
from upt.run.metrics import status

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


def test_the_split_with_most_pictures_is_asked(tmp_path):
    def selected(*arguments, **named) -> tuple[str, list[str]]:
        split, questions = run.select(VISION, *arguments, **named)
        return split, [question.id for question in questions]

    folder = vision_folder(tmp_path / "a")
    assert selected(folder) == ("testmini", ["0", "1", "2"])  # test has as many pictures and lacks more
    assert selected(folder, limit=2) == ("testmini", ["0", "1"]) and len(selected(folder, "test")[1]) == 6
    (folder / "images/3.png").write_bytes(png())
    assert selected(folder)[0] == "test"
    assert selected(vision_folder(tmp_path / "b", pictures=2))[0] == "testmini"
    with pytest.raises(ValueError, match="has no train among its files of questions, which are test, testmini"):
        run.select(VISION, folder, "train")
    with pytest.raises(FileNotFoundError, match="none of the pictures of test.*: images/0.png is expected"):
        run.select(VISION, vision_folder(tmp_path / "c", pictures=0))
    (folder / "testmini.jsonl").write_text(json.dumps(vision("0") | {"answer": None}) + "\n" + json.dumps(vision("1")))
    assert selected(folder, "testmini") == ("testmini", ["1"])
    (folder / "testmini.jsonl").write_text(json.dumps(vision("0") | {"answer": None}))
    with pytest.raises(ValueError, match="the owners publish no answers to testmini"):
        run.select(VISION, folder, "testmini")
    (folder / "testmini.jsonl").write_text((json.dumps(vision("0")) + "\n") * 2)
    with pytest.raises(ValueError, match="testmini.jsonl:2: the id '0' was there before"):
        run.select(VISION, folder)


def test_a_split_without_answers_is_not_chosen(tmp_path):
    folder = vision_folder(tmp_path, pictures=6)
    (folder / "test.jsonl").write_text("".join(json.dumps(vision(str(n)) | {"answer": None}) + "\n" for n in range(6)))
    assert run.select(VISION, folder)[0] == "testmini"


def test_text_gives_way_to_pictures(tmp_path):
    """One of two pictures is there: still the split with pictures, not the one in text alone."""
    row = {
        "sample_index": "1", "problem_index": "1", "problem_version": "Text Only", "question": "?", "answer": "5",
        "image": "", "question_type": "free-form", "metadata": {"subject": "s", "subfield": "f"},
    }  # fmt: skip
    (tmp_path / "testmini_text_only.json").write_text(json.dumps([row | {"sample_index": str(n)} for n in range(5)]))
    seen = [row | {"sample_index": str(n), "problem_version": "Text Lite", "image": f"{n}.png"} for n in range(2)]
    (tmp_path / "testmini.json").write_text(json.dumps(seen))
    (tmp_path / "0.png").write_bytes(png())
    assert run.select(benchmark("mathverse"), tmp_path)[0] == "testmini"
    (tmp_path / "0.png").unlink()
    assert run.select(benchmark("mathverse"), tmp_path)[0] == "testmini_text_only"


def test_variants_are_asked_together(tmp_path):
    row = {"question": "?", "answer": "1", "image": "a.png", "answer_type": "float", "subject": "x", "level": "y"}
    for variant in (1, 2, 10):
        folder = tmp_path / f"10trials/trial{variant}"
        folder.mkdir(parents=True)
        (folder / "dataset.json").write_text(json.dumps({str(seed): row for seed in (1, 2, 11)}))
        (folder / "a.png").write_bytes(png())
    split, found = run.select(benchmark("dynamath"), tmp_path, limit=7)
    assert split == "all" and [q.id for q in found] == ["1/1", "1/2", "1/10", "2/1", "2/2", "2/10", "11/1"]
    assert run.ask(benchmark("dynamath"), tmp_path, found[2], "boxed").image.size == (60, 60)


def test_how_a_question_is_asked(tmp_path):
    folder = vision_folder(tmp_path)
    (folder / "testmini.jsonl").write_text(json.dumps(vision("0", "B", ("5", "7"))))
    question = run.select(VISION, folder, "testmini")[1][0]
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
    question = run.select(VISION, folder)[1][0]._replace(image=image)
    with pytest.raises(data.BadRow, match="missing image file|not an image"):
        run.ask(VISION, folder, question, "boxed")


def test_a_hub_data_set_from_the_cache(tmp_path, monkeypatch, tiny):
    rows = [vision(str(n), image=png()) for n in range(2)]
    make_hub_dataset(tmp_path / "hub", "MathLLMs/MathVision", {"test": rows})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    question = run.select(VISION, folder_of("MathLLMs/MathVision"), "test")[1][1]
    assert question.id == "1" and run.ask(VISION, tmp_path, question, "boxed").image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="hf download --repo-type dataset no/such"):
        folder_of("no/such")
    with pytest.raises(ValueError, match="there is no folder nowhere: give the benchmark's data folder"):
        folder_of("nowhere")


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_the_hubs_parquet_stands_in_for_pictures_that_are_not_there(tmp_path):
    """As We-Math's and MathVerse's snapshots are: JSON and zipped pictures, and parquet with pictures in it."""
    row = {
        "ID": "2steps_1", "key": "2steps_1", "question number": 1, "question": "How long?", "option": "A. 1; B. 2",
        "answer": "B", "image_path": "2steps/image/1-1.png",
    }  # fmt: skip
    (tmp_path / "testmini.json").write_text(json.dumps([row]))
    stored = row | {"image_path": {"bytes": png(), "path": "1-1.png"}}
    parquet(tmp_path / "data/testmini-00000-of-00001.parquet", [stored])
    bench = benchmark("wemath")
    split, questions = run.select(bench, tmp_path)
    assert split == "testmini" and len(questions) == 1 and questions[0].image == png()
    assert bench.by_id(tmp_path)["1"].image == "2steps/image/1-1.png"  # scoring reads no pictures
    (tmp_path / "2steps/image").mkdir(parents=True)
    (tmp_path / "2steps/image/1-1.png").write_bytes(png())
    assert run.select(bench, tmp_path)[1][0].image == "2steps/image/1-1.png"


def test_dynamaths_hub_columns_and_variants(tmp_path):
    row = {
        "id": "12", "question": "?", "image": "images/12.png", "decoded_image": {"bytes": png("blue"), "path": None},
        "ground_truth": "4", "answer_type": "float", "subject": "algebra", "knowledge_level": "high school",
    }  # fmt: skip
    for variant in (1, 2):
        parquet(tmp_path / f"data/sample{variant}-00000-of-00001.parquet", [row | {"ground_truth": str(variant)}])
    bench = benchmark("dynamath")
    _, found = run.select(bench, tmp_path)
    assert [(q.id, q.gold, q.categories["level"]) for q in found] == [
        ("12/1", "1", ("high school",)), ("12/2", "2", ("high school",)),
    ]  # fmt: skip
    assert run.ask(bench, tmp_path, found[0], "boxed").image.getpixel((0, 0)) == (0, 0, 255)
    assert bench.by_id(tmp_path)["12/2"].image == "images/12.png"
    (tmp_path / "data/sample1-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="sample1.* is no parquet"):
        run.select(bench, tmp_path)


OFFICIAL = [
    ("wemath", {"choices": ("1", "2")}, ["Option: A. 1; B. 2", "<Answer>: <<your option>>"]),
    ("logicvista", {}, ["letter of the right choice"]),
    ("dynamath", {"answer_type": "float"}, ["'short answer'", "three decimal places"]),
    ("dynamath", {"answer_type": "multiple choice"}, ["only the letter"]),
    ("mathvista", {"choices": ("red", "blue")}, ["Hint: ", "the letter", "Choices:\n(A) red\n(B) blue"]),
    ("mathvista", {"answer_type": "float", "precision": 1}, ["Hint: ", "of 1 decimal place."]),
    ("mathvista", {"query": "Hint: their own"}, ["Hint: their own"]),
    ("mathverse", {"query": "Please reason."}, ["Please reason."]),
    ("mathvision", {"choices": ("red", "blue")}, ["\\boxed{}", "only the letter", "(A) red\n(B) blue"]),
]


@pytest.mark.parametrize(("name", "changed", "parts"), OFFICIAL)
def test_the_owners_style_says_how_to_answer(name, changed, parts):
    shown = benchmark(name).prompt(Question("1", "How long is AB?", "B", (), "", {})._replace(**changed))
    assert all(part in shown for part in parts) and ("query" in changed or "How long is AB?" in shown)


def test_the_unit_is_part_of_mathvistas_question():
    row = {
        "pid": "1", "question": "How much?", "answer": "5", "choices": None, "image": "a.png", "unit": "g",
        "question_type": "free_form", "answer_type": "integer", "precision": None,
        "metadata": {"task": "t", "skills": ["s"]},
    }  # fmt: skip
    assert benchmark("mathvista").question(None, row, "testmini").text == "How much? (Unit: g)"


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
    for changed in (
        {"seed": 1}, {"temperature": 0.5}, {"top_p": 0.9}, {"n": 3}, {"limit": 2}, {"max_new_tokens": 7},
        {"prompt": "boxed"}, {"max_pixels": 60 * 60, "min_pixels": 56 * 56}, {"split": "test"},
    ):  # fmt: skip
        with pytest.raises(shards.ShardError, match=f"written with other settings(?s:.*){next(iter(changed))}: "):
            run.main(config(folder, out, tiny, **{"n": 2, "temperature": 1.0} | changed))
    (folder / "testmini.jsonl").write_text("".join(json.dumps(vision(str(n), level=n)) + "\n" for n in range(3)))
    assert run.main(settings)["accuracy"] == result["accuracy"]  # what is asked is the same
    (folder / "testmini.jsonl").write_text("".join(json.dumps(vision(str(n), question="?")) + "\n" for n in range(3)))
    with pytest.raises(shards.ShardError, match="questions_file: the file has changed"):
        run.main(settings)
    (out / "manifest.json").unlink()
    with pytest.raises(shards.ShardError, match="responses of unknown settings"):
        run.main(settings)


def test_a_template_that_has_changed_is_found_and_pixel_limits_are_recorded(tmp_path, tiny):
    folder, out, prompt = vision_folder(tmp_path / "data"), tmp_path / "out", tmp_path / "mine.md"
    prompt.write_text("Say: {question}")
    settings = config(folder, out, tiny, prompt=str(prompt), min_pixels=56 * 56, max_pixels=84 * 84)
    run.main(settings)
    made = json.loads((out / "scores.summary.json").read_text())["responses"]["config"]
    assert made["pixels"] == {"min_pixels": 56 * 56, "max_pixels": 84 * 84} and made["split"] == "testmini"
    prompt.write_text("Do say: {question}")
    with pytest.raises(shards.ShardError, match="prompt_file: the file has changed"):
        run.main(settings)
    (out / "foreign.jsonl").write_text((out / "responses.jsonl").read_text())
    found = score.score(score.Config("mathvision", str(folder), out / "foreign.jsonl", out / "f.scores.jsonl"))
    assert found["responses"] is None  # nobody knows who made those


def test_a_broken_line_of_responses_is_named(tmp_path):
    (tmp_path / "responses.jsonl").write_text('{"id": "1"}\n{"id"\n{"id": "2"}\n')
    with pytest.raises(ValueError, match="responses.jsonl:2 is no response: remove the line"):
        run.answered(tmp_path / "responses.jsonl", 1)


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
    assert (
        "| MATH-Vision | 2 | " in printed
        and "| DynaMath* | 1 | 0.00 | 0.00 | 0 | average 0.00, worst 0.00 |" in printed
    )
    assert printed.count("| benchmark |") == 1 and "not run: logicvista" in printed
    assert json.loads((tmp_path / "out/summary.json").read_text()) == result
    (tmp_path / "root/logicvista").mkdir()
    logic = {"imagename": "a.png", "question": "?", "answer": "B", "skill": ["x"], "capability": ["y"]}
    (tmp_path / "root/logicvista/dataset.json").write_text(json.dumps({"v1_0": logic}))
    (tmp_path / "root/logicvista/a.png").write_bytes(b"no picture")
    result = run.main(settings)  # one whose pictures are all broken does not take the others along
    assert set(result["benchmarks"]) == {"mathvision", "dynamath"}
    assert "holds no response" in result["missing"]["logicvista"]
    with pytest.raises(ValueError, match="no benchmark runs from"):
        run.main(config(tmp_path, tmp_path / "o", tiny, benchmark="all"))


def test_a_long_prompt_counts_as_wrong_and_a_lost_picture_is_left_out(tmp_path, tiny, capsys):
    folder = vision_folder(tmp_path / "data", pictures=2)
    lines = [json.dumps(vision("0")), json.dumps(vision("1", question="word " * 400)), json.dumps(vision("2"))]
    lines.append(json.dumps(vision("3", image="")))  # its text has a mark
    (folder / "testmini.jsonl").write_text("\n".join(lines))
    run.main(config(folder, tmp_path / "out", tiny, split="testmini", max_prompt_tokens=300))
    rows = responses(tmp_path / "out")
    assert [r["id"] for r in rows] == ["0", "1"] and (rows[1]["response"], rows[1]["tokens"]) == ("", 0)
    printed = capsys.readouterr()
    assert "4 questions of the split testmini, 2 left out, 1 too long" in printed.out
    summary = json.loads((tmp_path / "out/scores.summary.json").read_text())
    assert (summary["asked"], summary["left_out"], summary["too_long"], summary["questions"]) == (4, 2, 1, 2)
    said = printed.err
    assert "1: prompt of" in said and "left out 2: missing image file: images/2.png" in said
    assert "left out 3: no image where the text announces one" in said
    assert "4 questions of mathvision, 2 with a picture" in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 2}, "--n 2 at temperature 0 gives the same response"),
        ({"limit": 0}, "--limit must be at least 1, not 0"),
        ({"prompt": "nothing"}, "no prompt 'nothing'"),
        ({"temperature": -1.0}, "--temperature must be 0"),
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


def test_a_model_reads_what_the_rules_cannot(tiny, tmp_path, monkeypatch):
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
    monkeypatch.setattr(extractor, "read", lambda policy, unread: ["surely not an answer, as it goes on"] * len(unread))
    assert score.score(score.Config(*given, extractor="model"), policy="a policy")["correct"] == 1
    monkeypatch.setattr(extractor, "read", read)
    found = score.score(score.Config(*given, extractor="model", protocol="ours"), policy="a policy")
    assert found["methods"] == {"vote key": 1, "model": 1, "none": 1} and found["correct"] == 2
    path.write_text(json.dumps({"id": "0", "response": "The answer is 5."}) + "\n")
    monkeypatch.setattr(extractor, "read", lambda policy, unread: ["5"] * len(unread))
    read_by = {
        protocol: score.score(score.Config(*given, protocol, "model"), policy="a policy")["methods"]
        for protocol in ("official", "ours")
    }
    assert read_by == {"official": {"number": 1}, "ours": {"model": 1}}  # it has no vote key
    with pytest.raises(ValueError, match="--extractor model needs the model"):
        score.score(score.Config(*given, extractor="model"))
    # Whether or not the rules leave it anything to read, and before the responses are looked at.
    monkeypatch.setattr(score, "folder_of", lambda name: pytest.fail("the benchmark was read first"))
    for settings, said in (
        ({"model": "nope"}, "there is no model folder nope"),
        ({"model": "runs/nope"}, "'runs/nope', which is no folder here"),
        ({"model": tiny, "adapter": "nope"}, "--adapter nope: no PEFT adapter there"),
        ({"model": tiny, "device": "gpu"}, "--device gpu: no such kind of device"),
    ):
        with pytest.raises(ValueError, match=said):
            score.score(score.Config(*given, extractor="model", **settings))


def test_the_extractor_shows_the_question_and_the_end_of_the_response(tiny, monkeypatch):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    question = VISION.question(None, vision("0"), "test")
    prompts, said = [], [r"\boxed{7}", r"\boxed{None}", "nothing"]

    def generate(policy, shown, rows, config):
        assert config.temperature == 0 and len(rows) == len(shown)
        prompts.extend(policy.tokenizer.decode(prompt.ids) for prompt in shown)
        ids = [policy.tokens(text) for text in said]
        return [extractor.decoding.Sampled(i, [], 0.0, 0.0, "stop") for i in ids]

    monkeypatch.setattr(extractor.decoding, "generate", generate)
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
    questions = run.select(VISION, folder)[1]
    rows, _ = run.respond(policy, VISION, folder, questions, settings)
    golds = [VISION.extract(row["response"], questions[0])[0] for row in rows]
    golds[2] = "no such answer"
    (folder / "testmini.jsonl").write_text("".join(json.dumps(vision(str(n), g)) + "\n" for n, g in enumerate(golds)))
    (folder / "test.jsonl").unlink()
    train_upt.main(
        train_upt.Config(
            data="shapes", model=tiny, steps=3, questions_per_step=4, group_size=4, max_new_tokens=6, eval_questions=0,
            out=root / "run", device="cpu", eval=(f"mathvision={folder}",), eval_every=2, limit=4, learning_rate=0.3,
            eval_limit=3,
            reward="random",
        )
    )  # fmt: skip
    return folder, root / "run"


def test_as_many_questions_are_followed_as_asked_for(tmp_path):
    folder = vision_folder(tmp_path)
    assert len(follow.Followed([f"mathvision={folder}"], 2).parts["mathvision"][2]) == 2
    assert status(ROW | {"benchmarks": {"mathvision": 0.25}}).count("mathvision 25.0") == 1


ROW = {"reward_mean": 0.5, "majority_share": 0.5, "entropy": 0.1, "length": 3.0, "clip_low": 0.0, "clip_high": 0.0}
ROW |= {"tokens_per_second": None, "peak_memory_gib": 1.0, "alarms": []}


def test_accuracy_is_followed_through_a_run(trained):
    folder, out = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = json.loads((out / "summary.json").read_text())["benchmarks"]["mathvision"]
    assert [row.get("benchmarks") is not None for row in rows] == [True, False, True]
    assert curve["0"] == rows[0]["benchmarks"]["mathvision"] == pytest.approx(2 / 3)  # of the model it starts from
    assert list(curve) == ["0", "2", "end"] and curve["2"] == rows[2]["benchmarks"]["mathvision"]
    assert curve["2"] < curve["0"]  # random rewards at a wild learning rate


def test_a_run_that_was_stopped_at_its_end_does_not_look_again(trained, tmp_path):
    _, out = trained
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    (tmp_path / "run/benchmarks.json").write_text('{"mathvision": 0.125}')
    again = train_upt.main(train_upt.Config(out=tmp_path / "run", resume=True, device="cpu"))
    assert again["benchmarks"]["mathvision"]["end"] == 0.125


def test_a_runs_own_model_is_evaluated(trained, tmp_path):
    folder, out = trained
    settings = run.Config(benchmark="mathvision", data=str(folder), run=out, out=tmp_path / "o", device="cpu")
    curve = json.loads((out / "summary.json").read_text())["benchmarks"]["mathvision"]
    assert run.main(settings)["accuracy"] == pytest.approx(curve["end"])
    assert (out / "benchmarks.json").exists()
    made = json.loads((tmp_path / "o/manifest.json").read_text())
    assert made["adapter"]["name"] == str(out / "adapter") and made["config"]["max_new_tokens"] == 6
    last = out / "checkpoints" / "step-000003"
    again = run.Config(benchmark="mathvision", data=str(folder), run=last, out=tmp_path / "p", device="cpu")
    assert run.main(again)["accuracy"] == curve["end"] and responses(tmp_path / "p") == responses(tmp_path / "o")
    with pytest.raises(ValueError, match="is in a checkpoint, which may be removed: give another"):
        run.Config(data=str(folder), run=last, out=last / "benchmarks").resolve()
    with pytest.raises(ValueError, match="--run brings its own model and adapter"):
        config(folder, tmp_path, "x", run=out).resolve()
    (tmp_path / "merged/start").mkdir(parents=True)  # a run that began from an adapter
    (tmp_path / "merged/adapter").mkdir()
    (tmp_path / "merged/manifest.json").write_text((out / "manifest.json").read_text())
    began = run.Config(data=str(folder), run=tmp_path / "merged")
    began._take_from_run()
    assert began.model == str(tmp_path / "merged/start")
    (tmp_path / "manifest.json").write_text((out / "manifest.json").read_text())
    with pytest.raises(ValueError, match="has no adapter yet"):
        run.Config(data=str(folder), run=tmp_path).resolve()


def test_what_cannot_be_followed(tiny, tmp_path):
    for spec in ("mathvision", "mathvision=", f"other={tmp_path}"):
        with pytest.raises(ValueError, match="give NAME=FOLDER, NAME being one of mathvision"):
            follow.Followed([spec], 4)
    folder = vision_folder(tmp_path / "a")
    with pytest.raises(ValueError, match="names mathvision twice"):
        follow.Followed([f"mathvision={folder}"] * 2, 4)
    with pytest.raises(ValueError, match="follows a benchmark: say how often, --eval-every N"):
        train_upt.Config(data="shapes", model=tiny, eval=("mathvision=x",)).resolve()

import copy
import functools
import json
import operator
import os
import random
import shutil
import struct
import subprocess
import weakref

import pytest
from PIL import Image

from upt.groups import manifests, shards
from upt.groups.shards import ShardError


def make_group(uid="shapes/train/000001", step=0, keys=("7", None), **fields):
    responses = [
        {"text": f"<think>hm</think>\\boxed{{{key}}}" if key else "no idea", "token_ids": [5, 6, 151645],
         "logprobs": [-0.1, -2.5, -1e-7], "finish": "stop", "entropy": 0.21, "self_certainty": 3.1, "key": key}
        for key in keys
    ]  # fmt: skip
    group = {"schema": shards.SCHEMA, "uid": uid, "step": step, "question": "How many?", "choices": None, "image": None,
             "gold": "7", "prompt_tokens": 143, "responses": responses}  # fmt: skip
    return group | fields


def change(group, path, value):
    """A copy of the group with one field, named like responses.0.key, changed or (value is ...) removed."""
    group = copy.deepcopy(group)
    *parents, last = [int(name) if name.isdigit() else name for name in path.split(".")]
    record = functools.reduce(operator.getitem, parents, group)
    record[last] = value
    if value is ...:
        del record[last]
    return group


def names(folder):
    return sorted(os.listdir(folder))


def test_a_group_comes_back_as_it_was(tmp_path):
    odd = 'naïve "quote" \u2028 line\nbreak 五 \ud800 <|im_end|>'
    groups = [
        make_group(question=odd, choices=["A", "5 cm"], image="images/ab.png", gold=None),
        make_group(keys=("1",) * 8, extra={"nested": [1, None, True]}),
    ]
    groups[1]["responses"][0] |= {"judge": {"score": 0.9, "parsed": True, "text": "ok"}, "reward": 1, "advantage": -0.0}
    groups[1]["responses"][1] |= {"judge": {"score": None, "parsed": False}}
    path = shards.shard_path(tmp_path, 12)
    shards.write_shard(path, iter(groups))
    assert names(tmp_path) == ["step-000012.jsonl"]
    assert path.read_bytes().count(b"\n") == 2
    assert shards.read_shard(path) == groups


def test_floats_round_trip_bit_for_bit(tmp_path):
    draw = random.Random(0)
    doubles = [struct.unpack("<d", draw.randbytes(8))[0] for _ in range(20000)]
    doubles = [value for value in doubles if value - value == 0]  # drop NaN and infinities
    doubles += [5e-324, -5e-324, 2.2250738585072009e-308, 1.7976931348623157e308, -0.0, 0.1 + 0.2, 1 / 3]
    group = make_group(keys=("1",))
    group["responses"][0] |= {"logprobs": doubles, "token_ids": [1] * len(doubles), "entropy": 5e-324}
    path = tmp_path / "step-000000.jsonl"
    shards.write_shard(path, [group])
    response = shards.read_shard(path)[0]["responses"][0]
    assert struct.pack(f"<{len(doubles)}d", *response["logprobs"]) == struct.pack(f"<{len(doubles)}d", *doubles)
    assert response["entropy"] == 5e-324


NAN, INF = float("nan"), float("inf")
BAD = [
    ("schema", "upt.group/2"), ("schema", ...), ("uid", 3), ("uid", ...), ("step", -1), ("step", True), ("step", 1.0),
    ("question", None), ("choices", "AB"), ("choices", [1]), ("choices", ...), ("image", "/etc/passwd"),
    ("image", "images/../../x.png"), ("image", ""), ("gold", 7), ("prompt_tokens", "9"), ("responses", []),
    ("responses", ...), ("responses.0", "text"), ("responses.1.text", None), ("responses.1.token_ids", [1, 2]),
    ("responses.1.token_ids", [1, 2, -3]), ("responses.1.token_ids", [1, 2, 3.0]), ("responses.1.logprobs", [0.0] * 4),
    ("responses.1.token_ids", [1, 2, True]), ("responses.1.token_ids", (1, 2, 3)), ("responses.1.logprobs", ...),
    ("responses.1.logprobs", [0.0, NAN, 0.0]), ("responses.1.logprobs", [0.0, -INF, 0.0]),
    ("responses.1.logprobs", [0.0, "0", 0.0]), ("responses.1.logprobs", [0.0, False, 0.0]),
    ("responses.1.logprobs", [0.0, 10**400, 0.0]), ("responses.1.finish", "eos"), ("responses.1.finish", []),
    ("responses.1.entropy", NAN), ("responses.1.entropy", ...), ("responses.1.self_certainty", INF),
    ("responses.1.key", 7), ("responses.1.key", ...), ("responses.1.judge", 0.5), ("responses.1.judge", {"score": 0.5}),
    ("responses.1.judge", {"score": 1.5, "parsed": True}), ("responses.1.judge", {"parsed": True}),
    ("responses.1.reward", NAN), ("responses.1.reward", "1"), ("responses.1.reward", None),
    ("responses.1.advantage", -INF), ("responses.1.advantage", True), ("extra", NAN), ("extra", {1, 2}),
]  # fmt: skip


@pytest.mark.parametrize("field, value", BAD)
def test_a_bad_field_is_refused_on_writing_and_reading(tmp_path, field, value):
    good, bad = make_group(), change(make_group(), field, value)
    path = tmp_path / "step-000003.jsonl"
    with pytest.raises(ShardError, match=r"step-000003\.jsonl:2: ") as error:
        shards.write_shard(path, [good, bad])
    if field != "extra":  # the message names the field: last word of its path, or the response that holds it
        assert field.split(".")[-1] in str(error.value) or "responses[0]" in str(error.value)
    assert names(tmp_path) == []
    if not isinstance(value, set | tuple):  # JSON has neither
        path.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
        with pytest.raises(ShardError, match=r"step-000003\.jsonl:2: "):
            shards.read_shard(path)
        assert not shards.is_complete(path)


@pytest.mark.parametrize("line", [b'{"schema": "upt.gr', b"", b"[]", b"null", b"\xff\xfe", b"[" * 100000])
def test_a_line_that_does_not_parse_names_file_line_and_fix(tmp_path, line):
    path = tmp_path / "step-000000.jsonl"
    shards.write_shard(path, [make_group()])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ShardError, match=r"step-000000\.jsonl:2: [\s\S]*same --out"):
        shards.read_shard(path)


def test_an_empty_shard_is_refused(tmp_path):
    path = tmp_path / "step-000000.jsonl"
    with pytest.raises(ShardError, match="at least one"):
        shards.write_shard(path, [])
    path.touch()
    with pytest.raises(ShardError, match="step-000000.jsonl:1: the shard is empty"):
        shards.read_shard(path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("crash", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_leaves_the_old_shard_and_no_temporary_file(tmp_path, monkeypatch, function, crash):
    path = tmp_path / "step-000000.jsonl"
    shards.write_shard(path, [make_group(uid="old")])

    def fail(*arguments):
        raise crash

    monkeypatch.setattr(shards.os, function, fail)
    with pytest.raises(type(crash)):
        shards.write_shard(path, [make_group(uid="new")])
    with pytest.raises(type(crash)):
        shards.write_shard(tmp_path / "step-000001.jsonl", [make_group(uid="new")])
    assert names(tmp_path) == ["step-000000.jsonl"]
    assert shards.read_shard(path)[0]["uid"] == "old"


def test_a_crash_between_two_groups_leaves_nothing(tmp_path):
    def groups():
        yield make_group()
        assert [name for name in names(tmp_path) if name.endswith(".tmp")]  # it is being written beside the shard
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        shards.write_shard(tmp_path / "step-000000.jsonl", groups())
    assert names(tmp_path) == []


def test_contents_are_flushed_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def note_fsync(handle):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(shards.os, "fsync", note_fsync)
    monkeypatch.setattr(shards.os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    shards.write_shard(tmp_path / "step-000000.jsonl", [make_group()])
    assert calls == ["file", "rename", "folder"]


def test_shards_are_listed_by_step_and_nothing_else_is_a_shard(tmp_path):
    for step in (1000000, 999999, 3):
        shards.write_shard(shards.shard_path(tmp_path, step), [make_group(step=step)])
    for name in (".step-000001.jsonl.0a1b2c3d.tmp", "step-000001.jsonl.tmp", "manifest.json", "step-1.jsonl"):
        (tmp_path / name).write_text("half")
    expected = ["step-000003.jsonl", "step-999999.jsonl", "step-1000000.jsonl"]
    assert [path.name for path in shards.list_shards(tmp_path)] == expected
    assert [group["step"] for group in shards.ShardReader(tmp_path)] == [3, 999999, 1000000]
    with pytest.raises(ShardError, match=r"python rollout\.py --out"):
        shards.ShardReader(tmp_path / "nowhere")


def test_a_shard_that_is_missing_or_bad_is_made_again(tmp_path, capsys):
    path = shards.shard_path(tmp_path, 1)
    assert not shards.is_complete(path)
    shards.write_shard(path, [make_group(step=1)])
    assert shards.is_complete(path)
    assert capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:-40] + b"\n")
    assert not shards.is_complete(path)
    assert f"{path}:1" in capsys.readouterr().err


def test_the_reader_holds_one_line_or_one_shard(tmp_path, monkeypatch):
    for step in range(4):
        shards.write_shard(shards.shard_path(tmp_path, step), [make_group(step=step) for _ in range(3)])

    class Watch:  # lives as long as the group that holds it
        def __init__(self, step):
            self.step = step

    alive, most, loads = weakref.WeakSet(), [0], json.loads

    def watched(*arguments, **keywords):
        group = loads(*arguments, **keywords)
        group["watch"] = Watch(group["step"])
        alive.add(group["watch"])
        most[0] = max(most[0], len(alive))
        return group

    monkeypatch.setattr(shards.json, "loads", watched)
    reader = shards.ShardReader(tmp_path)
    assert most[0] == 0  # nothing is read before it is asked for
    assert sum(1 for _ in reader) == 12
    assert most[0] <= 2  # the one that is read and the one before
    most[0] = 0
    stream = reader.shards()
    for _ in range(4):
        assert {watch.step for watch in alive} == set()
        path, groups = next(stream)
        assert {watch.step for watch in alive} == {groups[0]["step"]}
        assert path == shards.shard_path(tmp_path, groups[0]["step"])
        del groups
    assert most[0] == 3


def picture(seed=0, size=(17, 9)):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def test_a_picture_is_stored_once_and_losslessly(tmp_path):
    relative = shards.save_image(tmp_path, picture())
    first = os.stat(tmp_path / relative).st_mtime_ns
    assert shards.save_image(tmp_path, picture()) == relative
    assert os.stat(tmp_path / relative).st_mtime_ns == first
    assert shards.save_image(tmp_path, picture(1)) != relative
    assert shards.save_image(tmp_path, Image.frombytes("RGB", (9, 17), picture().tobytes())) != relative
    assert len(names(tmp_path / "images")) == 3
    loaded = shards.open_image(tmp_path, relative)
    assert (loaded.mode, loaded.size, loaded.tobytes()) == ("RGB", (17, 9), picture().tobytes())
    with pytest.raises(ShardError, match=r"convert\('RGB'\)"):
        shards.save_image(tmp_path, picture().convert("RGBA"))


def test_paths_that_lead_out_of_the_folder_are_refused(tmp_path):
    outside = tmp_path / "secret.png"
    picture().save(outside)
    folder = tmp_path / "run"
    shards.save_image(folder, picture())
    (folder / "images" / "link.png").symlink_to(outside)
    for relative in ("../secret.png", str(outside), "images/../../secret.png", "images/link.png", "", ".", "a\0b"):
        with pytest.raises(ShardError, match="leads out"):
            shards.open_image(folder, relative)
    other = tmp_path / "other"
    other.mkdir()
    (other / "images").symlink_to(tmp_path)  # a link, yet not to a folder of images
    with pytest.raises(ShardError, match="leads out"):
        shards.open_image(other, "images/secret.png")
    with pytest.raises(ShardError, match="no such picture"):
        shards.open_image(folder, "images/0.png")


def test_later_stages_link_to_the_pictures_and_the_run_can_be_moved(tmp_path):
    rollouts, judged, scored = (tmp_path / "run" / name for name in ("rollouts", "judged", "deep/scored"))
    relative = shards.save_image(rollouts, picture())
    for source, out in ((rollouts, judged), (judged, scored), (judged, scored)):
        shards.link_images(source, out)
    assert (scored / "images").is_symlink() and not os.path.isabs(os.readlink(scored / "images"))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = tmp_path / "moved" / "deep" / "scored"
    assert shards.open_image(moved, relative).tobytes() == picture().tobytes()
    shards.save_image(tmp_path / "else", picture(1))
    with pytest.raises(ShardError, match="another --out"):
        shards.link_images(tmp_path / "else", moved)
    shards.link_images(tmp_path / "text-only", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_are_copied_where_links_are_impossible(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **keywords):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shards.Path, "symlink_to", refuse)
    first = shards.save_image(tmp_path / "a", picture())
    shards.link_images(tmp_path / "a", tmp_path / "b")
    assert "copying" in capsys.readouterr().err
    second = shards.save_image(tmp_path / "a", picture(1))
    shards.link_images(tmp_path / "a", tmp_path / "b")  # a resumed stage fetches what came since
    for relative, seed in ((first, 0), (second, 1)):
        assert shards.open_image(tmp_path / "b", relative).tobytes() == picture(seed).tobytes()


def test_manifest_records_what_made_the_folder(tmp_path):
    model = make_model(tmp_path / "model")
    config = {"group_size": 8, "out": tmp_path, "sizes": (1, 2)}
    manifests.write(tmp_path, stage="rollout", config=config, seed=3, model=model, adapter="org/adapter")
    manifest = manifests.read(tmp_path)
    assert manifest["schema"] == shards.SCHEMA and manifest["stage"] == "rollout" and manifest["seed"] == 3
    assert manifest["config"] == {"group_size": 8, "out": str(tmp_path), "sizes": [1, 2]}
    assert set(manifest["versions"]) == {"python", *manifests.PACKAGES}
    assert manifest["versions"]["numpy"] == __import__("numpy").__version__
    assert manifest["model"] == {"name": str(model), "fingerprint": manifests.fingerprint(model)}
    assert manifest["adapter"] == {"name": "org/adapter", "fingerprint": "hub:org/adapter"}
    later = tmp_path / "later"
    manifests.write(later, stage="rewards", config={}, seed=3, model=manifest["model"])
    assert manifests.read(later)["model"] == manifest["model"]
    assert manifests.read(later)["adapter"] is None


def test_manifest_names_the_commit_and_whether_the_code_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    def stored():
        manifests.write(tmp_path / "out", stage="rollout", config={}, seed=0, model=None)
        manifest = manifests.read(tmp_path / "out")
        return manifest["git_commit"], manifest["dirty"]

    code = tmp_path / "shards.py"
    code.write_text("1")
    monkeypatch.setattr(manifests, "__file__", str(code))
    assert stored() == (None, None)
    git("init")
    git("add", "shards.py")
    git("commit", "-m", "first")
    commit, dirty = stored()
    assert len(commit) == 40 and dirty is False
    code.write_text("2")
    assert stored() == (commit, True)


def test_resuming_with_other_settings_names_what_differs(tmp_path):
    assert manifests.check(tmp_path, "s", {"a": 1}) is None
    manifests.write(tmp_path, stage="s", config={"a": 1, "b": (1, 2), "out": "x"}, seed=0, model=None)
    assert manifests.check(tmp_path, "s", {"a": 1, "b": (1, 2), "out": "y"}, ignore=("out",))["stage"] == "s"
    with pytest.raises(ShardError) as error:
        manifests.check(tmp_path, "s", {"a": 2, "b": [1, 2], "c": None}, ignore=("out",))
    message = str(error.value)
    assert "a: 1 there, 2 now" in message and "c:" not in message and "--out" in message
    assert "b:" not in message and "out:" not in message
    with pytest.raises(ShardError) as error:  # of another stage no setting is named
        manifests.check(tmp_path, "judge", {"z": 1})
    assert str(error.value) == f"{tmp_path} holds the output of the stage s, not of judge: use another --out"


def test_going_on_needs_the_same_model_files(tmp_path):
    model = make_model(tmp_path / "model")
    config = {"model": str(model)}
    manifests.write(tmp_path / "run", stage="s", config=config, seed=0, model=model)
    (model / "warmup.json").write_text("{}")
    assert manifests.check(tmp_path / "run", "s", config)
    (model / "model.safetensors").write_text("others")
    with pytest.raises(ShardError, match="other files of the model"):
        manifests.check(tmp_path / "run", "s", config)


def test_unknown_manifests_are_refused(tmp_path):
    shards.write_shard(tmp_path / "step-000000.jsonl", [make_group()])
    with pytest.raises(ShardError, match="no manifest.json"):
        manifests.check(tmp_path, "s", {})
    with pytest.raises(ShardError, match="no such file"):
        manifests.read(tmp_path)
    for text in ("{", "[]", '{"schema": "upt.group/9"}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ShardError, match="manifest.json: "):
            manifests.check(tmp_path, "s", {})


def make_model(folder):
    (folder / "sub").mkdir(parents=True)
    for name, text in (("config.json", "{}"), ("model.safetensors", "weights"), ("sub/chat.jinja", "x")):
        (folder / name).write_text(text)
    return folder


def test_fingerprint_follows_content_not_place(tmp_path):
    model = make_model(tmp_path / "model")
    before = manifests.fingerprint(model)
    assert before.startswith("sha256:") and len(before) == 7 + 64
    (model / "README.md").write_text("notes")
    assert manifests.fingerprint(shutil.move(model, tmp_path / "elsewhere")) == before
    model, seen = tmp_path / "elsewhere", {before}
    for name, text in (("config.json", "[]"), ("model.safetensors", "Weights"), ("sub/chat.jinja", "y")):
        (model / name).write_text(text)
        seen.add(manifests.fingerprint(model))
    (model / "sub" / "chat.jinja").rename(model / "chat.jinja")
    seen.add(manifests.fingerprint(model))
    assert len(seen) == 5


def test_fingerprint_of_large_weights_reads_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "MIB", 1024)
    path = tmp_path / "model.safetensors"
    content = bytearray(random.Random(0).randbytes(64 * 1024 + 1))
    path.write_bytes(content)
    before = manifests.fingerprint(tmp_path)
    for at, same in ((30000, True), (10, False), (len(content) - 10, False)):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert (manifests.fingerprint(tmp_path) == before) is same
    path.write_bytes(content[:30000] + content[30001:])  # same ends, another size: now small, read whole
    assert manifests.fingerprint(tmp_path) != before


def test_fingerprint_of_what_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert manifests.fingerprint("Qwen/Qwen2.5-VL-7B-Instruct") == "hub:Qwen/Qwen2.5-VL-7B-Instruct"
    for missing in (tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(FileNotFoundError):
            manifests.fingerprint(missing)
    with pytest.raises(ShardError, match="no model files"):
        manifests.fingerprint(tmp_path)

"""Exports: what plain transformers makes of the folder, what the card says, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from safetensors.torch import load_file

import export
from eval import heldout
from tests.test_adapters import filled, rewrite
from tests.test_train import SMALL
from train_upt import Config, main
from upt import hub, prompts
from upt.data import Question, shapes
from upt.errors import PolicyError, SettingError
from upt.model.decoding import generate
from upt.model.origin import origin_of
from upt.model.policy import Policy
from upt.run import card, trained
from upt.run.settings import Rollout


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> str:
    """The random snapshot as one of the hub: a card that names a licence, the licence, and small files of others."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("base") / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# a model\n")
    (folder / "LICENSE").write_text("as it is")
    (folder / "video_preprocessor_config.json").write_text('{"size": {"longest_edge": 5}}')
    (folder / "model.safetensors.index.json").write_text("{}")
    limits = {"size": {"shortest_edge": 56 * 56, "longest_edge": 280 * 280}}
    nested = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": limits, "video_processor": {"a": 1}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    return str(folder)


STEPS = SMALL | {"eval_questions": 4, "eval_samples": 2, "max_pixels": 7056}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A run of two steps whose last adapter does much, with the held-out scores after the first."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    main(Config(model=base, out=out, **STEPS | {"steps": 2, "save_every": 1, "eval_every": 1}))
    policy = Policy.load(base, dtype="fp32", device="cpu")
    policy.load_adapter(out / "adapter")
    filled(policy.model)
    policy.save(out / "adapter")
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> dict[bool, Path]:
    """The snapshot in float32, and the adapter alone (True)."""
    root = tmp_path_factory.mktemp("exports")
    for only in (False, True):
        export.main(export.Config(run=run, out=root / str(only), dtype="fp32", adapter_only=only))
    return {only: root / str(only) for only in (False, True)}


def ours(base: str, run: Path, image) -> str:
    """Our greedy answer to the question in the card."""
    policy = Policy.load(base, dtype="fp32", device="cpu", max_pixels=7056)
    policy.load_adapter(run / "adapter")
    question = Question("u", "How many red shapes are there?", None, image, None)
    encoded, _ = policy.encode([question], prompts.template("think-boxed"))
    (found,) = generate(policy, encoded, [0], Rollout(temperature=0.0, top_p=1.0, max_new_tokens=12, seed=0))
    return policy.tokenizer.decode(found.ids, skip_special_tokens=True)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18") and find_spec("torchvision") is None,
    reason="before transformers 5.18 it takes torchvision, as the card says",
)
@pytest.mark.parametrize("only", [False, True])
def test_the_cards_script_gives_our_answer_in_a_fresh_process(base, run, exported, tmp_path, only):
    folder = shutil.copytree(exported[only], tmp_path / "moved")
    (item,) = shapes.questions("test", 0, 1)
    image = item.image.resize((140, 112))
    image.save(folder / "picture.png")
    code = re.search(r"AutoProcessor.*?\n\n```python\n(.*?)```\n", (folder / "README.md").read_text(), re.S)[1]
    made = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    answer = ours(base, run, image)
    assert len(answer) > 5 and made.stdout == answer + "\n"


def test_a_merged_snapshot_is_the_base_with_the_adapter_added(base, run, exported):
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (base, exported[False]))
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    changed = {key.removeprefix("model.") for key in before if not torch.equal(before[key], after[key])}
    layers = {key.partition("language_model.")[2].partition(".lora")[0] for key in adapter}
    assert changed == {f"{layer}.weight" for layer in layers} and len(layers) == 21
    name = "layers.0.mlp.up_proj"
    A, B = (adapter[f"base_model.model.model.language_model.{name}.lora_{part}.weight"] for part in "AB")
    (key,) = [key for key in before if key.endswith(f"{name}.weight")]
    torch.testing.assert_close(after[key], before[key] + 2 * B @ A)  # alpha / rank


def test_the_card(base, run, exported):
    for only, folder in exported.items():
        text = (folder / "README.md").read_text()
        head = yaml.safe_load(text.split("---\n")[1])
        assert "base_model" not in head and head["license"] == "apache-2.0"  # a path is no model of the hub
        assert head["library_name"] == ("peft" if only else "transformers")
        summary = json.loads((run / "summary.json").read_text())
        after = summary["after"]["mean"]
        assert f"{100 * after['value']:.1f} [{100 * after['low']:.1f}, {100 * after['high']:.1f}] |" in text
        assert "| reward | random |" in text and "| steps | 2 |" in text and "| rounds |" not in text
        assert "    {question}\n    Reason in <think>" in text and "Licence: that of the base, apache-2.0." in text
        assert ("--enable-lora --max-lora-rank 16 " in text) is only and "Rounding" not in text
        command = re.search(r"\n```sh\n(vllm serve .*)\n```\n", text)[1]
        assert command.endswith("--lora-modules mine=." if only else " --dtype float32")
        assert f"\n# {'LoRA adapter for ' * only}model, trained on shapes with the reward random\n" in text
        assert "trained by upt with the reward `random`, without labels.\n" in text
        assert ("merged and in fp32, as here, it may score otherwise" in text) is not only
        assert json.loads((folder / "preprocessor_config.json").read_text())["size"]["longest_edge"] == 7056


def test_small_files_of_the_base_go_along(base, exported):
    """Without its pixel limits, which would go before those of the run, and what is ours or says where weights lie."""
    out = exported[False]
    for name in ("LICENSE", "video_preprocessor_config.json"):
        assert (out / name).read_bytes() == (Path(base) / name).read_bytes()
    nested = json.loads((out / "processor_config.json").read_text())
    assert nested == {"processor_class": "Qwen2_5_VLProcessor", "video_processor": {"a": 1}}
    assert not any((out / name).exists() for name in ("warmup.json", "base.json", "model.safetensors.index.json"))
    assert Policy.load(str(out), device="cpu").family.area_limits()["max_pixels"] == 7056


def sizes(folder: Path) -> dict[str, int]:
    """The sizes of its files, but for the card."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".md"}


def text_of(run: Path, out: Path, **settings) -> str:
    """The card of an adapter by itself."""
    export.main(export.Config(run=run, out=out, adapter_only=True, **settings))
    return (out / "README.md").read_text()


def test_the_card_of_a_checkpoint(run, tmp_path):
    """It has that one's steps and scores."""
    (row,) = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "held_out" in row]
    text = text_of(run / "checkpoints" / "step-000001", tmp_path / "first")
    before = json.loads((run / "before.json").read_text())["mean"]
    cells = f"{100 * before['value']:.1f} [{100 * before['low']:.1f}, {100 * before['high']:.1f}]"
    assert row["step"] == 1 and "| steps | 1 |" in text
    assert f"| right among samples | {cells} | {100 * row['held_out']['mean']:.1f} |" in text
    whole = text_of(run / "adapter", tmp_path / "whole")
    assert "| steps | 2 |" in whole and whole == text_of(run / "checkpoints" / "step-000002", tmp_path / "second")
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "metrics.jsonl").unlink()
    assert "Not measured." in text_of(copy / "checkpoints" / "step-000001", tmp_path / "unmeasured")
    (copy / "summary.json").unlink()
    assert "| steps | not known, as the run has not ended |" in text_of(copy, tmp_path / "unended")
    rounds = {"rounds": [{"end": {"adapter_step": 2}}, {"end": {"adapter_step": 3}}]}
    assert card.step_of(copy / "adapter", rounds) == 5


def test_a_run_that_started_from_an_adapter(base, run, tmp_path):
    """What is exported is a model of its own; the adapter belongs to the base with the first one in it."""
    first = str(run / "adapter")
    main(Config(model=base, out=tmp_path / "run", adapter=first, **STEPS | {"steps": 1, "eval_questions": 0}))
    export.main(export.Config(run=tmp_path / "run", out=tmp_path / "merged", dtype="fp32"))
    made, start = (origin_of(str(tmp_path / name)) for name in ("merged", "run/start"))
    assert made["adapter"] is None and start["adapter"] and made["fingerprint"] != start["fingerprint"]
    with pytest.raises(PolicyError, match="was made for"):
        Policy.load(str(tmp_path / "merged")).load_adapter(tmp_path / "run" / "adapter")
    assert (tmp_path / "merged" / "LICENSE").is_file()  # of the base, and not of what the run made of it
    text = text_of(tmp_path / "run", tmp_path / "adapter")
    assert f"A LoRA adapter for `model` with `{first}` merged into it, trained" in text
    assert f'BASE, FOLDER = "{tmp_path / "run" / "start"}", "."' in text and f"| adapter | {first} |" in text
    assert f"vllm serve {tmp_path / 'run' / 'start'} " in text and "Not measured." in text


def test_terms_of_a_base_of_the_hub(base, run, caches, tmp_path, monkeypatch, capsys):
    """They are fetched, as the weights are loaded without them; without an answer that is said."""
    folder = caches / "hub" / "models--org--vlm"
    commit = "0" * 40
    shutil.copytree(base, folder / "snapshots" / commit, ignore=shutil.ignore_patterns("README.md", "LICENSE"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    copy = shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["config"]["model"] = "org/vlm"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    text = text_of(copy, tmp_path / "offline")
    assert "the licence of org/vlm is not known, and is missing in the card: HF_HUB" in capsys.readouterr().err
    assert "license: other\n" in text and "base_model: org/vlm\n" in text

    def download(repo: str, revision: str, allow_patterns: list[str]) -> None:
        assert (repo, revision) == ("org/vlm", commit) and allow_patterns == ["README.md", "LICENSE*", "NOTICE*"]
        head = "license: other\nlicense_name: research\nlicense_link: https://a.b/c"
        (folder / "snapshots" / commit / "README.md").write_text(f"---\n{head}\n---\n")
        (folder / "snapshots" / commit / "NOTICE.txt").write_text("of all")

    monkeypatch.setattr(hub, "constants", SimpleNamespace(HF_HUB_OFFLINE=False))  # for what is fetched here alone
    monkeypatch.setattr(hub, "why_unreachable", lambda repo, kind: None)
    monkeypatch.setattr(hub, "snapshot_download", download)
    export.main(export.Config(run=copy, out=tmp_path / "online", dtype="fp32"))
    text = (tmp_path / "online" / "README.md").read_text()
    assert "license: other\n" in text and "license_name: research\n" in text and "license_link: https://a.b" in text
    assert "Licence: that of the base, research (https://a.b/c)." in text and "`org/vlm`, with a LoRA adapter" in text
    assert (tmp_path / "online" / "NOTICE.txt").read_text() == "of all" and not capsys.readouterr().err


@pytest.mark.parametrize("rank, room", [(2, 16), (24, 32), (48, 64), (129, 256), (400, 512)])
def test_ranks_that_vllm_takes(run, tmp_path, rank, room):
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": rank}))
    found = trained.trained(run)._replace(adapter=str(folder))
    assert f"--max-lora-rank {room} " in card.serve(found, None)


def test_rounding_is_measured_and_said(base, run, tmp_path, capsys, monkeypatch):
    found = export.main(export.Config(run=run, out=tmp_path / "much"))
    said = capsys.readouterr().err
    before, after = (load_file(Path(of) / "model.safetensors") for of in (base, tmp_path / "much"))
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    off = size = 0.0
    for name in [name.removesuffix(".lora_A.weight") for name in adapter if ".lora_A." in name]:
        A, B = (adapter[f"{name}.lora_{part}.weight"].double() for part in "AB")
        (key,) = [key for key in before if key.endswith(f"{name.partition('language_model.')[2]}.weight")]
        meant, start = 2 * B @ A, before[key].bfloat16().double()
        off += (after[key].double() - start - meant).square().sum()
        size += meant.square().sum()
    assert found["error"] == pytest.approx(float(off / size) ** 0.5, rel=1e-3) and 0 < found["error"] < 0.1 and not said
    small = shutil.copytree(run, tmp_path / "run")
    rewrite(small / "adapter", lambda tensors: {name: 1e-2 * tensor for name, tensor in tensors.items()})
    found = export.main(export.Config(run=small, out=tmp_path / "little", dtype="bf16"))
    assert 0.9 < found["error"] < 1.5  # nearly nothing of it is left
    said = f"Rounding to bf16 put the merged weights off by {100 * found['error']:.0f} % of what the adapter changes"
    for text in (capsys.readouterr().err, (tmp_path / "little" / "README.md").read_text()):
        assert said in text and "; serve the adapter (--adapter-only), or export it with --dtype fp32." in text
    # Nothing said of the dtype: where bf16 loses that much it is fp32, which loses nothing.
    written, real = [], Policy.export
    monkeypatch.setattr(Policy, "export", lambda policy, folder: written.append(folder) or real(policy, folder))
    chosen = export.main(export.Config(run=small, out=tmp_path / "chosen"))
    assert len(written) == 1  # what is known to be off too far is not written first
    export.main(export.Config(run=small, out=tmp_path / "asked", dtype="fp32"))
    assert chosen == {"out": str(tmp_path / "chosen"), "dtype": "fp32", "error": found["error"]}
    said = said.replace(" put ", " would put ")
    shown = capsys.readouterr()
    for text in (shown.err, (tmp_path / "chosen" / "README.md").read_text()):
        assert said in text and ", so they are in fp32: serve them so, or the adapter" in text
    assert shown.err.count("\n") == 1 and "fp32 snapshot with its card" in shown.out
    one, two = (sizes(tmp_path / name) for name in ("chosen", "asked"))
    assert one == two and (tmp_path / "little" / "model.safetensors").stat().st_size < one["model.safetensors"]
    name = "model.safetensors"
    assert (tmp_path / "chosen" / name).read_bytes() == (tmp_path / "asked" / name).read_bytes()


@pytest.mark.parametrize(
    "settings, title, how",
    [
        ({"data": "a/geoqa:3,~/mine/b:1", "model": "org/vlm"}, "vlm, trained on geoqa and b with", "."),
        ({"data": "geoqa", "quantize": "nf4"}, "trained on geoqa with", ", with 4-bit weights."),
        ({"from_shards": "x", "gpus": 2, "quantize": "nf4"}, "on shards", ", with 4-bit weights, on 2 processes."),
        ({"gpus": 2, "reward": "supervised"}, "trained on shapes with", "`supervised`, on 2 processes."),
    ],
)
def test_the_card_says_how_it_was_trained(run, tmp_path, settings, title, how):
    found = trained.trained(run)
    text = card.card(found._replace(settings=found.settings | settings), None)
    (heading,) = re.findall(r"^# (.*)$", text.partition("## Training")[0], re.M)[-1:]
    assert title in heading and re.search(r"trained by upt .*\.\n", text)[0].strip().endswith(how)
    assert ("without labels" in text) is ("reward" not in settings)
    assert ("beside the 4-bit weights and not merged" in text) is ("quantize" in settings)


# ------------------------------------------------------------------------------------------------ what is refused


def zeroed(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {max(tensors): torch.zeros_like(tensors[max(tensors)])})


def is_empty(folder: Path) -> bool:
    return not [*folder.iterdir()]


def test_what_cannot_be_exported_is_said(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(SettingError, match="full has files in it: give a new folder"):
        export.main(export.Config(run=run, out=tmp_path / "full"))
    with pytest.raises(SettingError, match="no run of train_upt.py there"):
        export.main(export.Config(run=tmp_path, out=tmp_path / "new"))


def test_an_export_is_no_run(base, exported):
    for only, how in ((False, rf"--model {exported[False]}$"), (True, rf"--model {base} --adapter {exported[True]}$")):
        with pytest.raises(SettingError, match=f"an export, and no run: ask or evaluate it by {how}"):
            trained.trained(exported[only])
    config = heldout.Config(model=base, adapter=str(exported[True]), device="cpu")  # as it says
    assert config.resolve().adapter == str(exported[True])


def test_a_snapshot_that_was_not_written_as_it_was_meant(run, tmp_path, monkeypatch):
    (tmp_path / "exports").mkdir()
    config, real = export.Config(run=run, out=tmp_path / "exports" / "mine", dtype="fp32"), Policy.export

    def damaged(policy, folder):
        real(policy, folder)
        zeroed(folder)

    monkeypatch.setattr(Policy, "export", damaged)
    with pytest.raises(PolicyError, match=r"was written and opens, but not as what was written: model.*differs; look"):
        export.main(config)
    assert is_empty(tmp_path / "exports")  # nothing that could be taken for an export
    monkeypatch.setattr(Policy, "export", real)
    monkeypatch.setattr(export, "copy_rest", lambda base, out: shutil.copy(base / "processor_config.json", out))
    with pytest.raises(PolicyError, match="the area of a picture differs"):
        export.main(config)
    assert is_empty(tmp_path / "exports")


@pytest.mark.parametrize("damage, said", [(zeroed, "differs"), (lambda folder: None, "has .* bytes in place of")])
def test_an_adapter_that_was_not_copied_as_it_is(run, tmp_path, monkeypatch, damage, said):
    config, real = export.Config(run=run, out=tmp_path / "mine", adapter_only=True), shutil.copytree

    def damaged(source, target, **how):
        real(source, target, **how)
        damage(Path(target))
        if said != "differs":
            file = Path(target) / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:-9])

    monkeypatch.setattr(shutil, "copytree", damaged)
    with pytest.raises(PolicyError, match=said):
        export.main(config)
    assert is_empty(tmp_path)


def test_an_export_that_was_killed_is_made_again(run, tmp_path):
    left = tmp_path / ".mine.partial" / "export"
    left.mkdir(parents=True)
    (left / "half").touch()
    export.main(export.Config(run=run, out=tmp_path / "mine", adapter_only=True))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not (tmp_path / "mine" / "half").exists()

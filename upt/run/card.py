"""The model card of an export: README.md of its folder, with a head that hubs read."""

import json
import re
from pathlib import Path

import yaml

from upt import prompts
from upt.data import names
from upt.files import read_json
from upt.groups import manifests
from upt.groups.stats import markdown
from upt.model.folders import is_hub_id, lora_of
from upt.model.origin import snapshot_folder
from upt.run import records
from upt.run.starting import means
from upt.run.trained import Trained

NAME = "README.md"
SCORES = {"mean": "right among samples", "greedy": "right greedily", "maj": "right by majority", "pass": "right in any"}
SETTINGS = "adapter init_adapter rounds data split reward advantage algorithm group_size questions_per_step".split()
SETTINGS += "learning_rate kl_coef lora_rank lora_alpha quantize seed".split()
OFF = 0.5  # of the adapter's change: up to this much rounding may put merged weights off
LICENCE = ("license", "license_name", "license_link")  # of a card's head
RANKS = (16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes (vllm.config.lora); 1 and 8 save nothing
OPEN = {  # how plain transformers opens it
    False: """model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="auto", device_map="auto")""",
    True: """model = AutoModelForImageTextToText.from_pretrained(BASE, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(model, FOLDER)""",
}
ASK = """
import torch
from PIL import Image
{peft}from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

PICTURE, QUESTION = "picture.png", "{question}"  # yours
{names}
{open}
tokenizer, look = AutoTokenizer.from_pretrained({source}), AutoImageProcessor.from_pretrained(FOLDER)
prompt = {prompt}.replace("{{question}}", QUESTION)
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": prompt}}]}}]
seen = look(images=[Image.open(PICTURE).convert("RGB")], return_tensors="pt")
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
text = text.replace("<|image_pad|>", "<|image_pad|>" * (int(seen["image_grid_thw"].prod()) // look.merge_size**2))
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
kinds = (inputs["input_ids"] == model.config.image_token_id).int()
inputs = {{**inputs, **seen, "mm_token_type_ids": kinds}}
inputs = {{name: value.to(model.device) for name, value in inputs.items()}}
ids = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def card(found: Trained, dtype: str | None, error: float | None = None) -> str:
    """Markdown on a merged snapshot in `dtype`, or on the adapter alone (None). `error`: see `rounding`."""
    settings, base, adapter_only = found.settings, found.settings["model"], dtype is None
    started, known = settings.get("adapter"), terms(base)
    head = {"library_name": "peft" if adapter_only else "transformers", "pipeline_tag": "image-text-to-text"}
    if is_hub_id(base) and not (adapter_only and started):  # else it belongs to a model that no hub has
        head["base_model"] = base
    head |= {"license": "other", "tags": ["upt", "grpo"]} | known
    path = found.folder / "summary.json"
    summary, made = read_json(path) if path.is_file() else {}, manifests.read(found.folder)
    of = f"`{base if is_hub_id(base) else Path(base).name}`{f' with `{started}` merged into it' if started else ''}"
    what = f"A LoRA adapter for {of}" if adapter_only else f"{of}, with a LoRA adapter merged into it, in {dtype}"
    step = step_of(Path(found.adapter), summary)
    rows = [("steps", "not known, as the run has not ended" if step is None else str(step))]
    given = {key: settings.get(key) for key in SETTINGS} | {"rounds": settings.get("rounds") or None}
    rows += [(key, str(value)) for key, value in given.items() if value is not None]
    origin = [
        *made["versions"].items(),
        ("code", made["git_commit"]),
        *((role, (made[role] or {}).get("fingerprint")) for role in ("model", "adapter") if made[role]),
    ]
    parts = [
        title(settings, adapter_only),
        f"{what}, trained by upt with the reward `{settings['reward']}`"
        + ("" if settings["reward"] == "supervised" else ", without labels")
        + f"{means(settings.get('quantize'), settings.get('gpus'))}.",
        *([rounding(dtype, error)] if error is not None else []),
        "## Training",
        markdown([("setting", ""), *rows]),
        "## Scores",
        scores(found, summary, measured_on(settings, dtype)),
        "## Use",
        "The prompt, in the user's turn behind the picture:",
        indented(prompts.template(settings["prompt"])),
        "With plain transformers, started in this folder. Before 5.18 it takes torchvision, too; where that is "
        "installed, AutoProcessor does in one call what the lines about `look` and `text` do:",
        f"```python\n{ask(found, adapter_only)}\n```",
        "With vLLM, started in this folder:",
        f"```sh\n{serve(found, dtype)}\n```",
        "## Origin",
        markdown([("", ""), *((key, str(value)) for key, value in origin)]),
        f"Licence: that of the base, {licence(known)}.",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


def step_of(adapter: Path, summary: dict) -> int | None:
    """The steps after which a run had an adapter; None: the run has not ended, and it is no checkpoint's."""
    if checkpoint := re.fullmatch(r"step-(\d+)", adapter.resolve().parent.name):
        return int(checkpoint[1])
    if "rounds" in summary:
        return sum(of["end"]["adapter_step"] for of in summary["rounds"])
    return summary.get("end", {}).get("adapter_step")


def title(settings: dict, adapter_only: bool) -> str:
    """What it is, in a heading: of a path the last part, since the rest says nothing elsewhere."""
    data = settings["data"]
    sets = [part for part, _ in names.parts(data)] if names.is_mixture(data) else [data]
    of = f"{'LoRA adapter for ' * adapter_only}{Path(settings['model']).name}"
    trained_on = "shards" if settings.get("from_shards") else " and ".join(Path(part).name for part in sets)
    return f"# {of}, trained on {trained_on} with the reward {settings['reward']}"


def rounding(dtype: str, error: float) -> str:
    """How far rounding to bf16 puts the merged weights off, as a share of the adapter's change, and what to make of it
    where they are in `dtype`."""
    off = f"the merged weights off by {100 * error:.0f} % of what the adapter changes them by (root mean square)"
    if dtype == "fp32":
        return f"Rounding to bf16 would put {off}, so they are in fp32: serve them so, or the adapter (--adapter-only)."
    advice = "; serve the adapter (--adapter-only), or export it with --dtype fp32" if error > OFF else ""
    return f"Rounding to bf16 put {off}{advice}."


def indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def terms(base: str) -> dict[str, str]:
    """What the head of a model's own card says of its licence, as far as that card is here."""
    folder = snapshot_folder(base)
    path = folder / NAME if folder else None
    if path is None or not path.is_file():
        return {}
    head = re.match(r"---\n(.*?\n)---\n", path.read_text("utf-8", errors="replace"), re.S)
    try:
        said = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    said = said if isinstance(said, dict) else {}
    return {name: " ".join(said[name].split())[:200] for name in LICENCE if isinstance(said.get(name), str)}


def licence(known: dict[str, str]) -> str:
    named = known.get("license_name") or known.get("license") or "which is not said beside its weights"
    return f"{named} ({known['license_link']})" if "license_link" in known else named


def scores(found: Trained, summary: dict, how: str) -> str:
    """Held-out scores before training and with this adapter, with 95 % intervals where the run has some, and how they
    were measured."""
    step, last = (step_of(path, summary) for path in (Path(found.adapter), found.folder / "adapter"))
    before, after = summary.get("before", {}), summary.get("after", {})
    if step != last:
        after = held_out(found.folder, step)
    shown = [name for name in SCORES if name in before and name in after]
    if not shown:
        return "Not measured."

    def cell(score: dict) -> str:
        interval = f" [{100 * score['low']:.1f}, {100 * score['high']:.1f}]" if "low" in score else ""
        return f"{100 * score['value']:.1f}{interval}"

    rows = [(SCORES[name], cell(before[name]), cell(after[name])) for name in shown]
    return f"Per cent of {before['graded']} held-out questions. {how}\n\n{markdown([('', 'before', 'after'), *rows])}"


def held_out(run: Path, step: int) -> dict[str, dict]:
    """The held-out scores {name: {"value": …}} that a run measured after so many steps; {} where it did not."""
    found = next((row["held_out"] for row in records.steps(run) if row["step"] == step and "held_out" in row), {})
    return {name: {"value": value} for name, value in found.items() if value is not None}


def measured_on(settings: dict, dtype: str | None) -> str:
    """What the scores are of."""
    weights = "4-bit weights" if settings.get("quantize") else "weights of the base"
    here = f"; merged and in {dtype}, as here, it may score otherwise" if dtype else ""
    if dtype is None and settings.get("quantize"):
        here = "; on full ones it may score otherwise"
    return f"They were measured in the run, the adapter beside the {weights} and not merged{here}."


def opened_as(model: str) -> str:
    """What a script that is started elsewhere opens a model by: a hub id, or the whole path of a folder."""
    return str(Path(model).expanduser().resolve()) if snapshot_folder(model) and not is_hub_id(model) else model


def ask(found: Trained, adapter_only: bool) -> str:
    """A script of plain transformers that asks the model about a picture, greedily."""
    settings = found.settings
    embedded = settings["data"] in names.EMBEDDED
    return ASK.strip("\n").format(
        question="How many red shapes are there?" if embedded else "What is shown?",
        peft="from peft import PeftModel\n" if adapter_only else "",
        names=f'BASE, FOLDER = {json.dumps(opened_as(found.model))}, "."' if adapter_only else 'FOLDER = "."',
        open=OPEN[adapter_only],
        source="BASE" if adapter_only else "FOLDER",
        prompt=repr(prompts.template(settings["prompt"])),
        tokens=settings["max_new_tokens"],
    )


def serve(found: Trained, dtype: str | None) -> str:
    """What to type for vLLM, which by itself takes float32 weights down to 16 bits."""
    settings = found.settings
    length = f"--max-model-len {settings['max_prompt_tokens'] + settings['max_new_tokens']}"
    if dtype is not None:
        return f"vllm serve . {length}" + (" --dtype float32" if dtype == "fp32" else "")
    rank, _, _ = lora_of(found.adapter)
    room = next((most for most in RANKS if rank <= most), None)
    if room is None:
        return f"# it takes adapters up to rank {RANKS[-1]}, and this one has {rank}: export it merged"
    model = opened_as(found.model)
    return f"vllm serve {model} {length} --enable-lora --max-lora-rank {room} --lora-modules mine=."

"""What a run would need on a card, reckoned and not measured: memory by part, slots, token budget, seconds of a step.

    python -m bench.estimate --model 7b --card h100 --preset mm-upt
    python -m bench.estimate --model path/to/snapshot --card 48 --max-new-tokens 1024
    python -m bench.estimate --tables        # those of docs/scale.md

The formulas are those of upt/reckoning, which train_upt.py asks before it loads a model. Weights are in bf16, or
in 4 bits with --quantize nf4. How long prompts and responses are on average only data and model can tell:
--prompt-tokens, --image-tokens, --response-tokens.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import rewards
from upt.errors import PolicyError, SettingError, suggest
from upt.model.origin import snapshot_folder
from upt.ranges import Count, Few, Name, Weight
from upt.reckoning.memory import GIB, MOST_SLOTS, MOST_TOKENS, PHASES, USABLE, Demand, Reckoned, fits, gib, reckon
from upt.reckoning.published import CONFIGS
from upt.reckoning.seconds import CARDS, CONTEXT, Card, Work, decoding_step, seconds
from upt.reckoning.sizes import Sizes, feature_bytes, sizes_of
from upt.run import cli, presets
from upt.run.typed import Typed, flag

SMALL = 24  # GiB of a card on which 4 bits are looked at
SHORT = dict(zip(("3b", "7b", "qwen3-8b"), CONFIGS, strict=True))


@dataclass
class Config(Typed):
    """Settings left at None take the preset's value."""

    model: Name = "7b"
    """3b, 7b (Qwen2.5-VL), qwen3-8b, a hub id that is here, a snapshot's folder or its config.json"""
    card: Name = "h100"
    """l4, rtx4090, a6000, l40s, a100, h100, h200, or GiB of memory"""
    preset: Literal["mm-upt", "self-judge", "self-judge-code"] = "mm-upt"
    """a paper's recipe"""
    questions_per_step: Count | None = None
    """questions in one step"""
    group_size: Few | None = None
    """responses to each question, G"""
    minibatches: Count | None = None
    """updates in one step"""
    kl_coef: Weight | None = None
    """weight of KL(policy, reference); 0: the reference is not needed"""
    max_prompt_tokens: Count | None = None
    """longest prompt"""
    max_new_tokens: Count | None = None
    """longest response"""
    prompt_tokens: Count = 1000
    """mean prompt, its picture included"""
    image_tokens: Count = 960
    """tokens of its picture"""
    response_tokens: Count = 600
    """mean response"""
    lora_rank: Few | None = None
    """rank of the adapter"""
    judge_mode: Literal["text", "logit"] | None = None
    """how responses are judged, where the preset's reward asks for it"""
    judge_max_new_tokens: Count | None = None
    """text mode: longest judgement"""
    update_tokens: Count = MOST_TOKENS
    """token budget of one micro-batch; fewer are taken where they don't fit"""
    quantize: Literal["nf4"] | None = None
    """nf4: 4-bit weights in the language model's linear layers"""
    gradient_checkpointing: bool | None = True
    """recompute activations in the backward pass"""
    tables: bool = False
    """print the tables of docs/scale.md, all models on all cards, and nothing else"""

    def resolve(self) -> "Config":
        """A copy with the preset's values. Raises SettingError for lengths that contradict each other."""
        values = presets.REAL | presets.PRESETS[self.preset]
        filled = {f.name: values[f.name] for f in fields(self) if f.name in values and getattr(self, f.name) is None}
        found = replace(self, **filled)
        for name, limit in (
            ("image_tokens", "prompt_tokens"),
            ("prompt_tokens", "max_prompt_tokens"),
            ("response_tokens", "max_new_tokens"),
        ):
            given, most = getattr(found, name), getattr(found, limit)
            if given > most:
                raise SettingError(
                    f"{flag(name)} {given} is above {flag(limit)} {most}: lower the one or raise the other"
                )
        return found


def model_of(name: str) -> tuple[str, dict]:
    """A model's name and its config.json. Raises PolicyError for one that is not here."""
    name = SHORT.get(name.lower(), name)
    if name in CONFIGS:
        return name, CONFIGS[name]
    path = Path(name).expanduser()
    folder = None if path.is_file() else snapshot_folder(name)
    file = path if path.is_file() else folder / "config.json" if folder else None
    try:
        return name, json.loads(file.read_text("utf-8"))
    except (AttributeError, OSError, ValueError) as error:
        why = f"{file}: {error}" if file else "no such folder, file or snapshot in the cache"
        known = f"{', '.join(SHORT)}, a snapshot's folder or a config.json{suggest(name, [*SHORT, *CONFIGS])}"
        raise PolicyError(f"--model {name}: {why}; give {known}") from error


def card_of(name: str) -> tuple[str, Card]:
    """A card by its name, or by its memory with the rates of the nearest in size, of several the fastest."""
    if name.lower() in CARDS:
        return name.lower(), CARDS[name.lower()]
    try:
        memory = int(name)
    except ValueError:
        known = f"{', '.join(CARDS)}, or GiB of memory, a whole number"
        raise SettingError(f"--card {name}: no such card; give {known}{suggest(name, CARDS)}") from None
    if memory < 4:
        raise SettingError(f"--card {name}: no card has so little memory; give 4 GiB or more")
    near = min(CARDS, key=lambda card: (abs(CARDS[card].memory - memory), -CARDS[card].tflops, -CARDS[card].bandwidth))
    return f"{memory} GiB at the rates of {near}", replace(CARDS[near], memory=memory)


def work_of(config: Config, found: Reckoned) -> Work:
    """The step that was reckoned, in the micro-batches that fit."""
    return Work(
        questions=config.questions_per_step,
        group_size=config.group_size,
        prompt_tokens=config.prompt_tokens,
        image_tokens=config.image_tokens,
        response_tokens=config.response_tokens,
        max_new_tokens=config.max_new_tokens,
        minibatches=config.minibatches,
        reference=config.kl_coef > 0,
        checkpointing=config.gradient_checkpointing,
        lora_rank=config.lora_rank,
        quantize=config.quantize,
        update_tokens=found.tokens,
    )


def free_of(card: Card) -> float:
    """Bytes that torch finds free on a card that nobody else uses."""
    return (card.memory - CONTEXT) * GIB


def limits(found: Reckoned, parts: dict, step: dict, work: Work) -> str:
    """What takes the most time, and whether memory is why, on one line."""
    flat = {(phase, part): s for phase, of in parts.items() for part, s in of.items()}
    total = sum(flat.values())
    (phase, part), most = max(flat.items(), key=lambda item: item[1])
    first = (
        f"{part} ({most / total:.0%} of a step)" if phase == "rollout" else f"{part} of the update ({most / total:.0%})"
    )
    slowest = max(step, key=step.get)
    whole = min(MOST_SLOTS, work.responses)
    slots = found.slots["rollout"]
    few = f", as KV has room for {slots} slots only" if slots + work.group_size <= whole else ""
    return f"{first}; decoding by {slowest}{few}"


def report(config: Config) -> str:
    """Memory, slots, token budget and seconds of one model on one card. Raises SettingError where it does not fit."""
    (name, published), (card_name, card) = model_of(config.model), card_of(config.card)
    sizes = sizes_of(published)
    phases = [*PHASES, "judging"] if rewards.needs_judge(presets.PRESETS[config.preset]["reward"]) else PHASES
    found = fits(published, replace(config, model=name), free_of(card), phases)
    slots, work = found.slots["rollout"], work_of(config, found)
    parts, step = seconds(sizes, card, work, slots), decoding_step(sizes, card, work, slots)
    lines = [
        f"{name}: {sizes.parameters / 1e9:.2f} billion parameters in {config.quantize or 'bf16'}, "
        f"rank {config.lora_rank}",
        f"{card_name}: {card.memory} GiB, {card.tflops:g} TFLOP/s in bf16, {card.bandwidth:g} TB/s",
        f"{config.preset}: {work.questions} questions x {work.group_size} responses",
        f"prompts of {work.prompt_tokens} tokens, at most {config.max_prompt_tokens}",
        f"responses of {work.response_tokens} tokens, at most {work.max_new_tokens}",
    ]
    for phase, of in found.phases.items():
        lines += ["", f"{phase}, GiB", *(f"  {part:24}{gib(size):>8}" for part, size in of.items())]
        lines.append(f"  {'in all':24}{gib(sum(of.values())):>8}")
    lines += ["", f"needs about {gib(found.needs)} of {gib(found.free)} GiB, of which {USABLE:.0%} can be used"]
    lines += [f"{slots} slots, {found.tokens:,} tokens in a micro-batch"]
    features = work.questions * feature_bytes(sizes, work.image_tokens)
    lines += [f"pictures' features: {gib(features)} GiB of the CPU's memory"]
    for phase, of in parts.items():
        lines += ["", f"{phase}, seconds of a step", *(f"  {part:24}{time:8.0f}" for part, time in of.items())]
        lines.append(f"  {'in all':24}{sum(of.values()):8.0f}")
    shown = ", ".join(f"{part} {1000 * time:.1f}" for part, time in step.items())
    if "judging" in phases:
        lines += ["", "seconds of judging are not reckoned"]
    lines += ["", f"a decoding step, milliseconds: {shown}", f"limit: {limits(found, parts, step, work)}"]
    return "\n".join([*lines, "reckoned by formulas (upt/reckoning), not measured"])


def row(name: str, sizes: Sizes, card_name: str, config: Config) -> str:
    """A line of the tables."""
    card, demand = CARDS[card_name], Demand.of(config)
    found = reckon(sizes, demand, free_of(card))
    how = f", {config.quantize}" if config.quantize else ""
    memory = f"| {card_name}, {card.memory}{how} | {gib(found.needs)} |"
    if not found.fits:
        return f"{memory} | | | | {refusal(name, config, card)} |"
    slots, work = found.slots["rollout"], work_of(config, found)
    parts = seconds(sizes, card, work, slots)
    rollout, update = (sum(of.values()) for of in parts.values())
    limit = limits(found, parts, decoding_step(sizes, card, work, slots), work)
    times = f"{rollout:,.0f} | {update:,.0f} | {(rollout + update) / 60:,.0f}"
    return f"{memory} {slots} | {found.tokens:,} | {times} | {limit} |"


def refusal(name: str, config: Config, card: Card) -> str:
    """What a run is told that does not fit."""
    try:
        fits(CONFIGS[name], replace(config, model=name), free_of(card))
    except SettingError as error:
        return f"does not fit: {str(error).rpartition('; ')[2]}"


def tables(config: Config) -> str:
    """Markdown: a table a model, a line a card, and one in 4 bits for the smaller cards."""
    found, packed = [], replace(config, quantize="nf4")
    small = [card for card, of in CARDS.items() if of.memory <= SMALL]
    for name, published in CONFIGS.items():
        sizes = sizes_of(published)
        found += [f"### {name}", "", f"{sizes.parameters / 1e9:.2f} billion parameters.", ""]
        found += ["| card, GiB | needs GiB | slots | update tokens | rollout s | update s | step min | limit |"]
        found += ["|---|---|---|---|---|---|---|---|"]
        found += [row(name, sizes, card, config) for card in CARDS]
        found += [*(row(name, sizes, card, packed) for card in small), ""]
    return "\n".join(found).rstrip()


def main(config: Config) -> None:
    config = config.resolve()
    print(tables(config) if config.tables else report(config))


if __name__ == "__main__":
    cli.launch(main, Config)

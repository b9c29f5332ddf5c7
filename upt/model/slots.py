"""Slots: responses that are decoded together, each in a row of buffers that never move, refilled as they finish.

A prompt's keys and values lie at one place for all of its responses; a response has room for its own. One step feeds
every slot's latest token to the model and draws the next one. It reads nothing on the host and makes no tensor whose
shape depends on a value, so that on a GPU it is one CUDA graph.
"""

import gc
import math
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from kernels.attention import decode_attention
from kernels.dispatch import use_triton
from kernels.parts import Part, Places
from upt.model.attention import Span
from upt.model.packing import Prompt, Row, layout
from upt.model.policy import Policy
from upt.reckoning.memory import PREFILL_TOKENS, slot_bytes

SMALLEST = 8  # slots below which a GPU takes no smaller graph: a step is no faster


@dataclass
class Job:
    """A prompt, and its rows by number; with `suffixes`, ways in which it goes on, those of each of them in turn."""

    prompt: Prompt
    rows: list[list[int]]
    suffixes: list[list[int]] = field(default_factory=list)

    def without(self, rows: Container[int]) -> "Job":
        """What is left of it when some rows are done."""
        return replace(self, rows=[[row for row in several if row not in rows] for several in self.rows])

    def start(self, branch: int) -> int:
        """The position of a response's first token."""
        behind = len(self.suffixes[branch]) if self.suffixes else 0
        return int(self.prompt.positions.max()) + 1 + behind


class Store:
    """Keys and values of every layer at some places, each with room for so many tokens."""

    def __init__(self, layers: int, places: int, heads: int, room: int, dim: int, like: torch.Tensor):
        # Not empty: on a CPU what is not in use is multiplied by 0, which a nan would survive.
        self.both = like.new_zeros(layers, 2, places, heads, room, dim)
        self.heads = torch.arange(heads, device=like.device)

    def rows(self, places: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Where token `at` (n,) of `places` (n,) lies for `write`: (n Hkv,)."""
        heads, room = self.both.shape[3:5]
        return ((places[:, None] * heads + self.heads) * room + at[:, None]).flatten()

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Put keys and values (n, Hkv, D) of a layer to `rows`."""
        for store, states in zip(self.both[layer], (keys, values)):
            store.view(-1, store.shape[-1]).index_copy_(0, rows, states.flatten(0, 1))

    def part(self, layer: int, lengths: torch.Tensor, places: Places | None = None) -> Part:
        keys, values = self.both[layer, :, : len(lengths)]
        return Part(keys, values, lengths, places)

    def move(self, places: torch.Tensor, to: torch.Tensor) -> None:
        for layer in self.both:  # one at a time: what is moved is copied first
            layer[:, to] = layer[:, places]


@dataclass
class Sizes:
    """How much there is room for."""

    slots: int
    places: int  # prompts that are held at a time
    prompt: int  # tokens of the longest prompt
    new: int  # tokens of the longest response
    axes: int  # of positions
    branches: int = 1  # suffixes of a prompt
    suffix: int = 0  # tokens of the longest one


def kept(policy: Policy) -> tuple[int, int, int]:
    """What is kept of a token: layers, heads of keys and values, their size."""
    text = policy.base.config.text_config
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers, text.num_key_value_heads, dim


def bytes_of(policy: Policy, sizes: Sizes) -> tuple[int, int]:
    """What a slot takes, with its logits, and what a prompt with its suffixes does."""
    head = policy.base.lm_head.weight
    token = 2 * math.prod(kept(policy)) * head.itemsize
    return slot_bytes(token, sizes.new, len(head)), token * (sizes.prompt + sizes.branches * sizes.suffix)


class Slots:
    """The buffers, and what goes on in them. `draw` is `kernels.sample` with all but logits, rows and position."""

    def __init__(self, policy: Policy, sizes: Sizes, keys: Sequence[int], draw: Callable, stops: Sequence[int]):
        self.policy, self.sizes, self.draw = policy, sizes, draw
        self.count, self.nobody = sizes.slots, len(keys)  # slots in use; the row of a slot that is idle
        device, like = policy.device, policy.base.lm_head.weight
        layers, heads, dim = kept(policy)

        def store(places: int, room: int) -> Store:
            return Store(layers, places, heads, room, dim, like)

        branches = sizes.places * sizes.branches
        self.prompts, self.own = store(sizes.places, sizes.prompt), store(sizes.slots, max(1, sizes.new - 1))
        self.suffixes = store(branches, sizes.suffix) if sizes.suffix else None
        self.last = like.new_empty(branches, like.shape[1])  # of the last token before the responses

        def integers(size: int, value: int = 0) -> torch.Tensor:
            return torch.full((size,), value, device=device)

        self.prompt_lengths, self.suffix_lengths = integers(sizes.places), integers(branches)
        # Of each slot: its row; tokens drawn of it, of which all but the last have been fed; the position of its first
        # one; the latest one; what its noise is keyed by.
        self.row, self.drawn = integers(sizes.slots, self.nobody), integers(sizes.slots)
        self.first, self.token, self.noise = integers(sizes.slots, 1), integers(sizes.slots), integers(sizes.slots)
        self.numbers, self.stops = torch.arange(sizes.slots, device=device), torch.tensor(stops, device=device)
        self.keys = torch.tensor([*keys, 0], device=device)
        # Of each row, and of nobody: what is wanted of it.
        self.ids = torch.zeros(len(keys) + 1, sizes.new, dtype=torch.int32, device=device)
        self.logprobs = torch.zeros(len(keys) + 1, sizes.new, device=device)
        self.entropy, self.certainty = torch.zeros(2, len(keys) + 1, dtype=torch.float64, device=device)
        self.lengths = integers(len(keys) + 1)
        # On the host: the row in a slot and the branch that it looks at; rows that wait; how many rows a place still
        # has; rows that have finished.
        self.held: list[tuple[int, int] | None] = [None] * sizes.slots
        self.done: list[int] = []
        self.told = 0  # of these
        self.waiting: deque[tuple[int, int, int]] = deque()  # (row, branch, position of the first token)
        self.left: dict[int, int] = {}
        self.lookups, self.graphs = {}, {}
        self.lookups[self.count] = self.new_places(self.count)
        if device.type == "cuda" and use_triton(like):
            self.capture()

    # ------------------------------------------------------------------------------------------------------ a step

    def step(self) -> None:
        """Draw one token in every slot that is in use."""
        if self.count in self.graphs:
            self.graphs[self.count].replay()
        else:
            self.eager_step(self.count)

    def eager_step(self, count: int) -> None:
        self.written = self.own.rows(self.numbers[:count], (self.drawn[:count] - 1).clamp(min=0))
        self.look = self.lookups[count]
        position = (self.first[:count] + self.drawn[:count] - 1).expand(self.sizes.axes, -1)[..., None]
        hidden = self.policy.hidden(self.token[:count, None], position, self, cache=self)[:, -1]
        self.sample(hidden, self.numbers[:count])

    def update(self, keys, values, layer: int, *args, **kwargs):
        """As transformers' caches have it: the latest token's keys and values (R, Hkv, 1, D) are kept."""
        self.own.write(layer, keys[:, :, 0], values[:, :, 0], self.written)
        return keys, values

    def __call__(self, layer: int, query, keys, values, scale: float) -> torch.Tensor:
        """The attention of a layer for one query (R, Hq, 1, D) a slot: (R, 1, Hq, D)."""
        prompts, suffixes = self.look
        parts = [
            self.prompts.part(layer, self.prompt_lengths, prompts),
            self.own.part(layer, self.drawn[: len(query)]),
        ]
        if self.suffixes:
            parts.append(self.suffixes.part(layer, self.suffix_lengths, suffixes))
        return decode_attention(query[:, :, 0], parts, scale)[:, None]

    def sample(self, hidden: torch.Tensor, slots: torch.Tensor) -> None:
        """Draw the next token of `slots` (n,) from hidden states (n, D), and note what is wanted of it."""
        row, drawn = self.row[slots], self.drawn[slots]
        token, logprob, entropy, certainty = self.draw(self.logits(hidden), row_ids=self.noise[slots], position=drawn)
        self.ids[row, drawn], self.logprobs[row, drawn] = token.int(), logprob
        self.entropy[row] += entropy
        self.certainty[row] += certainty
        self.lengths[row] = drawn + 1
        done = (token[:, None] == self.stops).any(1) | (drawn + 1 == self.sizes.new) | (row == self.nobody)
        self.row[slots] = row.masked_fill(done, self.nobody)
        self.drawn[slots] = (drawn + 1).masked_fill(done, 0)
        self.token[slots] = token

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states (n, D): (n, V), on a GPU not rounded to bf16, as in training (kernels/logprob.py)."""
        head = self.policy.base.lm_head
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
        return head(hidden)

    def capture(self) -> None:
        """Record a step as a CUDA graph, for all slots and for halves of them; nothing may be in them yet."""
        count, pool = self.sizes.slots, None
        while True:
            self.lookups[count] = self.new_places(count)
            stream = warm_up_stream(self.policy.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles kernels and lets libraries choose theirs
                    self.eager_step(count)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.eager_step(count)
            self.graphs[count], pool = graph, graph.pool()
            if count // 2 < SMALLEST:
                return
            count //= 2

    def release(self) -> None:
        """Give back all memory but that of what has been sampled."""
        self.prompts = self.own = self.suffixes = self.last = None
        self.graphs, self.lookups = {}, {}
        gc.collect()
        torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------- filling the slots

    def refill(self, jobs: deque[Job]) -> None:
        """See which rows have finished; give idle slots to rows that wait, and to those of further jobs."""
        idle = (self.row[: self.count] == self.nobody).tolist()
        finished = [slot for slot in range(self.count) if idle[slot] and self.held[slot]]
        for slot in finished:
            row, branch = self.held[slot]
            place = branch // self.sizes.branches
            self.held[slot] = None
            self.done.append(row)
            self.left[place] -= 1
            if not self.left[place]:
                del self.left[place]
        free = [slot for slot in range(self.count) if not self.held[slot]]
        # A prefill for every slot that becomes idle would go through the model with few tokens at a time.
        if jobs and len(free) >= max(1, self.count // 16):
            self.load(jobs, len(free))
        if free and self.waiting:
            chosen = [self.waiting.popleft() for _ in free[: len(self.waiting)]]
            self.open(free[: len(chosen)], chosen)
        elif finished and not jobs and not self.waiting:
            self.shrink(free)

    def load(self, jobs: deque[Job], wanted: int) -> None:
        """Take jobs to places that are free, until so many rows wait."""
        free = [place for place in range(self.sizes.places) if place not in self.left]
        while jobs and free and len(self.waiting) < wanted:
            batch, tokens = [], 0
            while jobs and free and len(self.waiting) < wanted:
                job = jobs[0]
                tokens += len(job.prompt.ids) + sum(map(len, job.suffixes))
                if batch and tokens > PREFILL_TOKENS:
                    break
                jobs.popleft()
                place = free.pop(0)
                batch.append((place, job))
                self.left[place] = sum(map(len, job.rows))
                for branch, rows in enumerate(job.rows):
                    number = place * self.sizes.branches + branch
                    self.waiting += [(row, number, job.start(branch)) for row in rows]
            self.prefill(batch)

    def prefill(self, batch: Sequence[tuple[int, Job]]) -> None:
        """Run prompts with their suffixes through the model, and keep what their responses need of them."""
        # A row's last token is not an input, so each suffix gets one more.
        rows = [Row(job.prompt, [[*suffix, 0] for suffix in job.suffixes], []) for _, job in batch]
        packed = layout(rows, self.policy.device, self.policy.base.dtype)
        places = [place for place, _ in batch]
        branches = [place * self.sizes.branches + branch for place, job in batch for branch in range(len(job.rows))]
        spans = [span for several in packed.responses for span in several]
        recorder = Recorder([(self.prompts, places, packed.prompts)])
        self.prompt_lengths[places] = lengths(packed.prompts).to(self.policy.device)
        if self.suffixes:
            recorder = Recorder([(self.prompts, places, packed.prompts), (self.suffixes, branches, spans)])
            self.suffix_lengths[branches] = lengths(spans).to(self.policy.device)
        hidden = self.policy.hidden(
            packed.ids, packed.positions, packed.attention, [row.prompt for row in rows], recorder
        )[0]
        self.last[branches] = hidden[[end - 1 for _, end in (spans if self.suffixes else packed.prompts)]]

    def open(self, slots: list[int], rows: list[tuple[int, int, int]]) -> None:
        """Start rows in idle slots with their first token."""
        at = torch.tensor(slots, device=self.policy.device)
        numbers, branches, first = torch.tensor(rows, device=self.policy.device).T
        self.row[at], self.first[at], self.noise[at] = numbers, first, self.keys[numbers]
        for slot, (row, branch, _) in zip(slots, rows, strict=True):
            self.held[slot] = row, branch
        self.set_places()
        self.sample(self.last[branches], at)

    def shrink(self, free: list[int]) -> None:
        """With nothing left to start, move the rows together, so that a step has fewer slots."""
        live = self.count - len(free)
        target = min(count for count in self.graphs if count >= live) if self.graphs else live
        if not 0 < target <= self.count - max(1, self.count // 16):  # moving has its price, too
            return
        behind = [slot for slot in range(target, self.count) if self.held[slot]]
        at, to = (torch.tensor(slots, device=self.policy.device) for slots in (behind, free[: len(behind)]))
        if behind:
            self.own.move(at, to)
            for state in (self.row, self.drawn, self.first, self.token, self.noise):
                state[to] = state[at]
        for slot, hole in zip(behind, free, strict=False):
            self.held[hole] = self.held[slot]
        del self.held[target:]
        self.count = target
        self.set_places()

    # -------------------------------------------------------------------------------------------- who looks where

    def new_places(self, count: int) -> tuple[Places, Places | None]:
        """Which prompt, and which suffix, each of the first slots looks at."""
        none, device = [-1] * count, self.policy.device
        suffixes = Places(none, len(self.suffix_lengths), device) if self.suffixes else None
        return Places(none, self.sizes.places, device), suffixes

    def set_places(self) -> None:
        if self.count not in self.lookups:
            self.lookups[self.count] = self.new_places(self.count)
        prompts, suffixes = self.lookups[self.count]
        branches = [held[1] if held else -1 for held in self.held]
        prompts.set([branch // self.sizes.branches if branch >= 0 else -1 for branch in branches])
        if suffixes:
            suffixes.set(branches)


@lru_cache
def warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace for every stream that it has met."""
    return torch.cuda.Stream(device)


class Recorder:
    """A cache in transformers' sense that writes spans of a sequence to places of stores: (store, places, spans)."""

    def __init__(self, targets: Sequence[tuple[Store, list[int], list[Span]]]):
        self.targets = []
        for store, places, spans in targets:
            device, sizes = store.both.device, lengths(spans)
            source = torch.cat([torch.arange(start, end) for start, end in spans])
            at = torch.cat([torch.arange(size) for size in sizes])
            place = torch.tensor(places).repeat_interleave(sizes)
            self.targets.append((store, source.to(device), store.rows(place.to(device), at.to(device))))

    def update(self, keys, values, layer: int, *args, **kwargs):
        """Keep keys and values (1, Hkv, N, D) of a layer."""
        for store, source, rows in self.targets:
            store.write(layer, *(states[0].transpose(0, 1)[source] for states in (keys, values)), rows)
        return keys, values


def lengths(spans: Sequence[Span]) -> torch.Tensor:
    return torch.tensor([end - start for start, end in spans])

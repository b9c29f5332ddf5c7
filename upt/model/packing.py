"""Groups as rows of one forward pass: `[prompt | y_1 | ... | y_G]`, each response seeing the prompt and itself.

A response has the positions it would have on its own, and the prompt is computed once instead of G times. A row longer
than the token budget is split into rows that each repeat the prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from upt.model.families import Features


@dataclass
class Prompt:
    """An encoded question: token ids with the image's placeholders expanded, positions, image features."""

    uid: str
    ids: list[int]  # P tokens
    positions: torch.Tensor  # (axes, P): three for M-RoPE
    features: Features | None


@dataclass
class Row:
    """A prompt and some of its responses; `owners` are their numbers (group, response)."""

    prompt: Prompt
    responses: list[list[int]]
    owners: list[tuple[int, int]]

    def __len__(self) -> int:
        # The last token of a response predicts nothing, so it is not an input.
        return len(self.prompt.ids) + sum(len(response) - 1 for response in self.responses)


def pack(prompts: Sequence[Prompt], responses: Sequence[Sequence[list[int]]], budget: int) -> Iterator[list[Row]]:
    """Micro-batches of rows, each batch of at most `budget` tokens with its padding, longest rows first.

    responses[g][i] are the token ids of response i to prompt g. A response that alone is over the budget gets a row
    and a batch of its own. Empty responses have no log-probability and are left out.
    """
    rows = []
    for g, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        row = None
        for i, response in enumerate(group):
            if not response:
                continue
            if row is None or len(row) + len(response) - 1 > budget:
                row = Row(prompt, [], [])
                rows.append(row)
            row.responses.append(list(response))
            row.owners.append((g, i))
    rows.sort(key=len, reverse=True)
    batch: list[Row] = []
    for row in rows:
        if batch and len(batch[0]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def layout(batch: Sequence[Row]) -> tuple[torch.Tensor, ...]:
    """Pack rows into tensors: ids (B, L), positions (axes, B, L), segment (B, L), sources (N,), targets (N,).

    `segment` is 0 for the prompt, i for the i-th response, -1 for padding; `sources` are the places, in what
    `predicting` makes of the hidden states, that predict the response tokens `targets`. No place is there twice.
    """
    length = max(len(row) for row in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    axes = len(batch[0].prompt.positions)
    positions = torch.zeros(axes, len(batch), length, dtype=torch.long)
    segment = torch.full((len(batch), length), -1)
    sources, targets, count = [], [], 0
    for b, row in enumerate(batch):
        size = len(row.prompt.ids)
        flat, first = list(row.prompt.ids), int(row.prompt.positions.max()) + 1
        place, segments = [row.prompt.positions], [0] * size
        for number, response in enumerate(row.responses, 1):
            start = b * length + len(flat)
            sources += [len(batch) * length + count, *range(start, start + len(response) - 1)]
            count += 1
            targets += response
            flat += response[:-1]
            segments += [number] * (len(response) - 1)
            place.append(torch.arange(first, first + len(response) - 1).expand(axes, -1))
        ids[b, : len(flat)] = torch.tensor(flat)
        positions[:, b, : len(flat)] = torch.cat(place, 1)
        segment[b, : len(flat)] = torch.tensor(segments)
    return ids, positions, segment, torch.tensor(sources), torch.tensor(targets)


def predicting(hidden: torch.Tensor, batch: Sequence[Row]) -> torch.Tensor:
    """The hidden states (B, L, D) of a batch as (B L + R, D): behind all of them the prompt's last, once a response.

    That state predicts the first token of each of its responses. An index that repeats would do, but its backward pass
    adds with threads in a race, so that rounding changes from run to run; `expand` has a sum there.
    """
    states, length = hidden.flatten(0, 1), hidden.shape[1]
    ends = states[[b * length + len(row.prompt.ids) - 1 for b, row in enumerate(batch)]]  # (B, D)
    return torch.cat([states, *(end.expand(len(row.responses), -1) for end, row in zip(ends, batch, strict=True))])


def packed_mask(segment: torch.Tensor) -> torch.Tensor:
    """The attention mask (B, 1, L, L) of packed rows: a token sees the prompt and what precedes it in its response."""
    query, key = segment[:, :, None], segment[:, None, :]
    # Padding sees padding, so that no row of the softmax is empty.
    return ((query == key) | ((key == 0) & (query > 0))).tril()[:, None]

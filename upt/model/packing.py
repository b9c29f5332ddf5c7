"""Groups as rows of one forward pass: `[prompt | y_1 | ... | y_G]`, each response seeing the prompt and itself.

A response has the positions it would have on its own, and the prompt is computed once instead of G times. A row longer
than the token budget is split into rows that each repeat the prompt. A group that sees its image in two views is two
rows. The rows of a batch lie one behind the other in one sequence, without padding; who sees whom is computed in
attention.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from upt.model.attention import Gather, Padded, Span, Varlen, packed, transfer
from upt.model.families import Features


@dataclass
class Prompt:
    """An encoded question: token ids with the image's placeholders expanded, positions, image features."""

    uid: str
    ids: list[int]  # P tokens
    positions: torch.Tensor  # (axes, P): three for M-RoPE
    features: Features | None
    twin: "Prompt | None" = None  # the same with the image in a view, which the second half of a group answers

    def seen_by(self, i: int, size: int) -> "Prompt":
        """What response i of a group of `size` answers: this prompt, or its twin."""
        return self if self.twin is None or 2 * i < size else self.twin


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
    """Micro-batches of rows, each of at most `budget` tokens, longest rows first.

    responses[g][i] are the token ids of response i to prompt g. A response that alone is over the budget gets a row
    and a batch of its own. Empty responses have no log-probability and are left out.
    """
    rows = []
    for g, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        row = None
        for i, response in enumerate(group):
            if not response:
                continue
            seen = prompt.seen_by(i, len(group))
            if row is None or row.prompt is not seen or len(row) + len(response) - 1 > budget:
                row = Row(seen, [], [])
                rows.append(row)
            row.responses.append(list(response))
            row.owners.append((g, i))
    rows.sort(key=len, reverse=True)
    batch: list[Row] = []
    size = 0
    for row in rows:
        if batch and size + len(row) > budget:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row)
    if batch:
        yield batch


@dataclass
class Packed:
    """A batch of rows as one sequence of N tokens without padding, on a device: row after row `[prompt | y_1 | ...]`.

    `prompts` and `responses` are on the host: where in the sequence each row's prompt lies, and what of each response
    is an input, all but its last token: none of a response of one token.
    """

    ids: torch.Tensor  # (1, N)
    positions: torch.Tensor  # (axes, 1, N)
    targets: torch.Tensor  # (M,), the tokens of all responses, in order
    sources: Gather  # the places whose states predict the targets: a prompt's last predicts all first tokens
    attention: Varlen | Padded  # who sees whom; `layout` of Policy.hidden
    prompts: list[Span]
    responses: list[list[Span]]

    def predicting(self, hidden: torch.Tensor) -> torch.Tensor:
        """The states (M, D) that predict the targets, of hidden states (1, N, D)."""
        return self.sources(hidden[0])


def layout(batch: Sequence[Row], device: torch.device, dtype: torch.dtype) -> Packed:
    """Rows as one sequence on a device, for a model whose weights are of type `dtype`."""
    ids, targets, sources, place = [], [], [], []
    prompts, responses = [], []
    axes = len(batch[0].prompt.positions)
    for row in batch:
        start, first = len(ids), int(row.prompt.positions.max()) + 1
        ids += row.prompt.ids
        place.append(row.prompt.positions)
        prompts.append((start, len(ids)))
        responses.append([])
        for response in row.responses:
            sources += [prompts[-1][1] - 1, *range(len(ids), len(ids) + len(response) - 1)]
            targets += response
            ids += response[:-1]
            place.append(torch.arange(first, first + len(response) - 1).expand(axes, -1))
            responses[-1].append((len(ids) - len(response) + 1, len(ids)))
    parts = [torch.tensor([ids]), torch.cat(place, 1)[:, None], torch.tensor(targets, dtype=torch.long)]
    gather = Gather.of(torch.tensor(sources, dtype=torch.long)).to(device)
    return Packed(*transfer(parts, device), gather, packed(prompts, responses, device, dtype=dtype), prompts, responses)

"""Which rows of a set are a split, and what they are called.

Splits: `train`, `validation` and `test` can always be asked for, and `train` never shares a row with the other two.
A missing `test` is the `validation` split and the other way round. With neither, both are the same 5 % of `train`,
chosen by a hash of the uid, and `train` is the rest; a set without `train` divides `validation` (else `test`) so.

Uids: `<label>/<split>/<row number>`, the label being the set's name, the last part of the hub id or the folder's name,
wherever the folder lies. A column `uid`, `id` or `pid` counts instead if its values are unique over all splits in use.
"""

import logging
from hashlib import blake2b

from upt.data.cells import column
from upt.data.columns import UID, pick
from upt.data.files import Tables
from upt.data.names import ALIASES, SPLITS
from upt.errors import DataError

HELD_OUT = 0.05  # share of the rows, in a set that has but one split


def by_split(label: str, found: Tables) -> Tables:
    """Tables by train, validation, test. Of `test` and `testmini` the first counts; one unnamed split is train."""
    names = {split: next((alias for alias in aliases if alias in found), None) for split, aliases in SPLITS.items()}
    unknown = [name for name in found if name not in ALIASES]
    if names["train"] is None and len(unknown) == 1:
        names["train"] = unknown[0]
    if set(names.values()) == {None}:
        raise DataError(f"data set {label!r}: its splits {', '.join(found)} are none of {', '.join(ALIASES)}")
    if unused := [name or "files without a split in their name" for name in found if name not in names.values()]:
        logging.getLogger(__name__).warning("data set %s: not used: %s", label, ", ".join(unused))
    return {split: found[name] for split, name in names.items() if name is not None}


def uids(label: str, tables: Tables) -> dict[str, list[str]]:
    """The uids of each split, in the order of its rows."""
    plain = {split: [f"{label}/{split}/{i:06d}" for i in range(len(table))] for split, table in tables.items()}
    own = {}
    for split, table in tables.items():
        values = column(table, pick(table.column_names, UID))
        own[split] = [p if v in (None, "") else str(v) for p, v in zip(plain[split], values, strict=True)]
    every = [uid for of_split in own.values() for uid in of_split]
    return own if len(set(every)) == len(every) else plain


def choose(split: str, uids_of: dict[str, list[str]]) -> tuple[str, list[int], str]:
    """The split to read from, the rows of it, and a word on both, by the rules at the top of this file."""
    base = next(s for s in SPLITS if s in uids_of)  # what is trained on
    wanted = {"train": ("train",), "validation": ("validation", "test"), "test": ("test", "validation")}
    sources = {s: next((w for w in wanted[s] if w in uids_of), base) for s in SPLITS}
    source, uids = sources[split], uids_of[sources[split]]
    if source != base or base not in (sources["validation"], sources["test"]):
        return source, list(range(len(uids))), "" if source == split else f"its {source} split, for want of {split}"
    # A number in [0, 1) from each uid. The smallest are held out: at least one row, and never all of them.
    hashes = [int(blake2b(uid.encode(errors="replace"), digest_size=8).hexdigest(), 16) / 2**64 for uid in uids]
    count = max(min(max(sum(h < HELD_OUT for h in hashes), 1), len(uids) - 1), 0)
    held = set(sorted(range(len(uids)), key=hashes.__getitem__)[:count])
    if split == "train":
        return source, [i for i in range(len(uids)) if i not in held], f"without {count} rows held out by uid hash"
    return source, sorted(held), f"held out of {len(uids)} {source} rows by uid hash"

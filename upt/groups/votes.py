"""The vote of a group: how its responses' keys are counted. Every function takes a group or a list of keys."""


def keys_of(group_or_keys) -> list[str | None]:
    """The vote keys of a group's responses in order, None for an abstention; a list of keys stays what it is."""
    if isinstance(group_or_keys, dict):
        return [response["key"] for response in group_or_keys["responses"]]
    return list(group_or_keys)


def counts(group_or_keys) -> dict[str, int]:
    """c(a) for each key a, in order of first appearance; abstentions are no key."""
    c: dict[str, int] = {}
    for key in keys_of(group_or_keys):
        if key is not None:
            c[key] = c.get(key, 0) + 1
    return c


def majority_key(group_or_keys, ties: str = "none") -> str | None:
    """m, the most frequent key. None if all abstain, or if several tie (ties="first": the one that appears first)."""
    if ties not in ("none", "first"):
        raise ValueError(f"ties is {ties!r}, expected 'none' or 'first'")
    c = counts(group_or_keys)
    top = max(c.values(), default=0)
    leaders = [key for key, n in c.items() if n == top]
    return leaders[0] if len(leaders) == 1 or (leaders and ties == "first") else None


def majority_share(group_or_keys) -> float:
    """max_a c(a) / G, ties included; 0 if all abstain."""
    keys = keys_of(group_or_keys)
    return max(counts(keys).values(), default=0) / max(len(keys), 1)


def distinct(group_or_keys) -> int:
    """How many different keys the group has; abstentions are no key."""
    return len(counts(group_or_keys))


def abstentions(group_or_keys) -> int:
    """How many responses have no vote key."""
    return sum(key is None for key in keys_of(group_or_keys))

"""What a run needs, reckoned from a model's config.json and the run's settings: bytes of memory, seconds of a step.

    sizes      parameters, adapters, KV cache and image features of a model
    published  the configurations of well-known models
    memory     rollout, judging and update by part; slots and token budgets that fit; runs that don't
    seconds    cards, and what a step takes on them

Nothing here was measured on a GPU: these are formulas, each with where it comes from, and nothing heavy is imported.
"""

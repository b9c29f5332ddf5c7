"""Questions with pictures, from wherever they are: `load("geoqa")`, `load("path/to/folder")`, `load("shapes")`."""

import lazy_loader

from upt.errors import DataError

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules={"fingerprint", "names", "questions", "rows", "sources", "marks", "images", "mixture", "shapes"},
    submod_attrs={
        "names": ["ALIASES", "is_mixture", "parts"],
        "questions": ["Question", "Questions", "BadRow"],
        "marks": ["PLACEHOLDER"],
        "images": ["decode"],
        "mixture": ["load", "quotas", "shares"],
    },
)
__all__ += ["DataError"]

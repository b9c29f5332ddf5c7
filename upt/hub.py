"""The hub, asked first whether it can be reached: its libraries try again and again, for minutes."""

from collections.abc import Sequence

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


def why_unreachable(repo: str, kind: str) -> str | None:
    """Why there is no answer about a repository of this kind, `model` or `dataset`, and what can be set.

    It waits for HF_HUB_ETAG_TIMEOUT, 10 seconds by default. None where there is an answer, whatever it says, and with
    HF_HUB_OFFLINE, of which the libraries speak themselves.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    seconds = constants.HF_HUB_ETAG_TIMEOUT
    try:
        HfApi().repo_info(repo, repo_type=kind, timeout=seconds)
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # of the network, whose libraries have no common parent
        return (
            f"the hub does not answer ({str(error).strip() or type(error).__name__}); before the command, "
            f"HF_HUB_OFFLINE=1 takes what the caches have and HF_HUB_ETAG_TIMEOUT={6 * seconds} waits longer than "
            f"{seconds} s"
        )
    return None


def fetch(repo: str, commit: str, patterns: Sequence[str]) -> str | None:
    """Fetch the files of a model that match `patterns`, at a commit, to where its others are in the cache.

    Why they did not come, in a few words; None if they did, or are not there.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if why := why_unreachable(repo, "model"):
        return why
    try:
        snapshot_download(repo, revision=commit, allow_patterns=[*patterns])
    except Exception as error:  # as above, and of a repository that is gone or gated
        return " ".join((str(error).strip() or type(error).__name__).split())[:200]
    return None

"""A small data set in a hub cache, as `hf download --repo-type dataset` leaves it, for tests without a network.

    rows = {"train": [{"image": png_bytes, "problem": "<image>How long is AB?", "solution": "<answer> 5 </answer>"}]}
    make_hub_dataset(home / "hub", "leonardPKU/GEOQA_R1V_Train_8K", rows)

A process started with HF_HOME=home (or HF_HUB_CACHE=home/hub) and HF_HUB_OFFLINE=1 finds it under that id. Both are
read when `huggingface_hub` is imported; inside a test set `huggingface_hub.constants.HF_HUB_CACHE` instead.
"""

from hashlib import sha256
from pathlib import Path

import datasets

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IMAGE_COLUMNS = {"image": datasets.Image(), "images": datasets.List(datasets.Image())}


def make_hub_dataset(cache_home: Path, repo_id: str, rows_by_split: dict[str, list[dict]], card: bool = True) -> Path:
    """Write `refs/main`, `blobs/` and linked `snapshots/<commit>/data/<split>-00000-of-00001.parquet`, one per split.

    `cache_home` is the folder that holds `datasets--org--name`. All rows have the same columns; `image` is the bytes of
    a picture, `images` a list of them, everything else is stored as it is. The README.md that `push_to_hub` writes
    (which file is which split, and how many rows) is added with `card`. Returns the snapshot folder.
    """
    repo = Path(cache_home) / ("datasets--" + repo_id.replace("/", "--"))
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "refs", repo / "blobs", snapshot / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(COMMIT)

    written = {}
    for split, rows in rows_by_split.items():
        written[split] = repo / f"{split}.parquet"
        stored = [{key: _stored(value) for key, value in row.items()} for row in rows]
        table = datasets.Dataset.from_list(stored)
        features = {key: IMAGE_COLUMNS.get(key, feature) for key, feature in table.features.items()}
        table.cast(datasets.Features(features)).to_parquet(written[split])
    files = {f"data/{split}-00000-of-00001.parquet": file for split, file in written.items()}
    if card:
        files["README.md"] = repo / "README.md"
        infos = "".join(f"  - name: {split}\n    num_examples: {len(rows)}\n" for split, rows in rows_by_split.items())
        paths = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in rows_by_split)
        front = f"dataset_info:\n  splits:\n{infos}configs:\n- config_name: default\n  data_files:\n{paths}"
        files["README.md"].write_text(f"---\n{front}---\n")
    for name, file in files.items():
        blob = repo / "blobs" / sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        link = snapshot / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path(*[".."] * (len(Path(name).parts) + 1)) / "blobs" / blob.name)
    return snapshot


def _stored(value):
    """Bytes and lists of bytes in the form in which `datasets` stores pictures."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return [_stored(v) for v in value] if isinstance(value, list) else value

"""What a row of a data set says: question, choices, gold answer and picture, or why it can't be used."""

import ast
import json
import re
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from upt.data.questions import BadRow, Question

MAX_PIXELS = 50_000_000  # read from the header, before a decompression bomb is unpacked
MIN_SIDE, MAX_ASPECT = 2, 200  # pixels, and long to short side: beyond these the Qwen image processors refuse
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not EPS: Pillow runs Ghostscript on it

# Of several names, the first that a set has is used.
QUESTION = ("problem", "question", "query", "prompt", "text")
ANSWER = ("answer", "solution", "gold", "label", "final_answer", "ground_truth")
CHOICES = ("choices", "options")
IMAGE = ("decoded_image", "images", "image", "img", "image_path")  # beside `decoded_image`, `image` is only a name
UID = ("uid", "id", "pid")
# Qwen's own tokens too: in a question's text they would be counted as places for visual features.
PLACEHOLDER = re.compile(r"[ \t]*(?:<image ?\d*>|<\|(?:vision_start|image_pad|vision_end)\|>)[ \t]*", re.I)
FOLDER, BROKEN = "__folder__", "__broken__"  # our columns beside those of JSONL: where a line is from, what ails it


def pick(columns: list[str], names: tuple[str, ...]) -> str | None:
    """The first of `names` that a set has as a column, as the set spells it; None for none."""
    by_lower = {column.lower(): column for column in columns}
    return next((by_lower[name] for name in names if name in by_lower), None)


def question_of(uid: str, row: dict, columns: list[str | None], folder: Path | None) -> Question:
    """The question of a row, from its columns of question, answer and choices; paths of pictures lie in `folder`.

    Raises BadRow for a row without text, without the picture that it announces, or with one that can't be used.
    """
    said, gold, choices = (row.get(column) for column in columns)
    text = PLACEHOLDER.sub(" ", said if isinstance(said, str) else "").encode(errors="ignore").decode().strip()
    if row.get(BROKEN) or not text:
        raise BadRow(uid, row.get(BROKEN) or "no question text")
    image = _image(uid, row, folder)
    if image is None and PLACEHOLDER.search(said):
        raise BadRow(uid, "no image where the text announces one")
    return Question(uid, text, _choices(uid, choices), image, gold_of(gold))


def gold_of(value) -> str | None:
    """The answer in a cell, without <answer> tags; None where there is none."""
    text = "" if value is None or value != value else str(value)  # a missing number is NaN, which differs from itself
    tags = re.findall(r"<answer>(.*?)</answer>", text, re.I | re.S)
    return (tags[-1] if tags else text).strip() or None


def _choices(uid: str, value) -> list[str] | None:
    """A list, a mapping from letter to text, or either of them written as JSON or Python → the texts in order."""
    for parse in (json.loads, ast.literal_eval):
        if isinstance(value, str) and value.strip():
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                value = parse(value)
    if isinstance(value, dict):
        value = [value[letter] for letter in sorted(value)]
    if value and not isinstance(value, list | tuple):
        raise BadRow(uid, f"choices are no list: {str(value)[:40]!r}")
    return [str(text) for text in value or [] if text is not None] or None


def _image(uid: str, row: dict, folder: Path | None) -> Image.Image | None:
    lower = {column.lower(): value for column, value in row.items()}
    value = next((lower[name] for name in IMAGE if lower.get(name) not in (None, "", [])), None)
    stored = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    if len(stored) > 1:
        raise BadRow(uid, f"several images are not supported: {len(stored)} in this row")
    content = stored[0] if stored else None
    if isinstance(content, dict):
        content = content.get("path") if content.get("bytes") is None else content["bytes"]
    if content is None or isinstance(content, bytes):
        return None if content is None else decode(uid, content)
    path = str(content)[:80]
    if folder is None or not isinstance(content, str) or "\0" in content:
        raise BadRow(uid, f"neither image bytes nor a path to a file: {path!r}")
    try:
        # In the hub cache the files of a snapshot are links to `blobs`, beside `snapshots`.
        root = (folder.parents[1] if folder.parent.name == "snapshots" else folder).resolve()
        file = (Path(row.get(FOLDER, folder)) / content).resolve()
        if not file.is_relative_to(root):
            raise BadRow(uid, f"image path outside the data folder: {path}")
        if not file.is_file():
            raise BadRow(uid, f"missing image file: {path}")
        content = file.read_bytes()
    except (OSError, RuntimeError) as error:  # too long a name, links in a circle, no permission
        raise BadRow(uid, f"unreadable image path: {path}: {first_line(error)}") from error
    return decode(uid, content)


def decode(uid: str, content: bytes) -> Image.Image:
    """Encoded bytes → an RGB picture, upright by its EXIF orientation, what is transparent turned white."""
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadRow(uid, f"over the pixel limit: {width} × {height} > {MAX_PIXELS:,}")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            raise BadRow(uid, f"image shape not supported: {width} × {height}")
        image = ImageOps.exif_transpose(image)  # from here on all of the file is read, `open` reads but its header
        if image.mode.startswith("I"):  # 16 bits of grey, which `convert("RGB")` would clip to white
            image = image.convert("I").point(lambda grey: grey / 256).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadRow:
        raise
    except Exception as error:  # decoders meet damaged bytes with nearly anything, struct.error and SyntaxError too
        kinds = {Image.DecompressionBombError: "over the pixel limit", Image.UnidentifiedImageError: "not an image"}
        kind = "truncated image" if "truncated" in str(error).lower() else "undecodable image"
        raise BadRow(uid, f"{kinds.get(type(error), kind)}: {first_line(error)}") from error


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

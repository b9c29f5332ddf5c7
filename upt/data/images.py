"""Encoded bytes to a picture that a model can be shown."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

from upt.data.questions import BadRow

MAX_PIXELS = 50_000_000  # read from the header, before a decompression bomb is unpacked
MIN_SIDE, MAX_ASPECT = 2, 200  # pixels, and long to short side: beyond these the Qwen image processors refuse
# Not EPS: Pillow runs Ghostscript on it. Not every Pillow has AVIF and JPEG 2000.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
SAMPLE_FORMAT = 339  # TIFF's tag for what a sample's bits are; 1: an integer without a sign
_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")


def starts_as_image(head: bytes) -> bool:
    """Whether bytes, of which the first 16 are enough, begin as a picture of one of FORMATS does."""
    if head.startswith(_STARTS) or head[4:12] in (b"ftypavif", b"ftypavis"):
        return True
    portable = head[:1] == b"P" and head[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6") and head[2:3].isspace()
    windows = head[:2] == b"BM" and head[6:10] == b"\0\0\0\0"
    return portable or windows or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def decode(uid: str, content: bytes) -> Image.Image:
    """Encoded bytes → an RGB picture, upright by its EXIF orientation, what is transparent turned white."""
    Image.init()
    try:
        image = Image.open(BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadRow(uid, f"over the pixel limit: {width} × {height} > {MAX_PIXELS:,}")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            raise BadRow(uid, f"image shape not supported: {width} × {height}")
        # 16 bits have a known range; Pillow has no mode for 32 bits without a sign.
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        unsigned = image.mode == "I" and image.format == "TIFF" and image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 1
        image = ImageOps.exif_transpose(image)  # from here on all of the file is read, `open` reads but its header
        if deep:
            image = image.convert("I").point(lambda grey: grey / 256).convert("L")
        elif image.mode in ("I", "F"):
            image = _scaled(np.asarray(image).view(np.uint32) if unsigned else np.asarray(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadRow:
        raise
    except Exception as error:  # decoders meet damaged bytes with nearly anything, struct.error and SyntaxError too
        if isinstance(error, Image.UnidentifiedImageError):  # which says but an address in memory
            raise BadRow(uid, "not an image") from error
        kind = "truncated image" if "truncated" in str(error).lower() else "undecodable image"
        kind = "over the pixel limit" if isinstance(error, Image.DecompressionBombError) else kind
        raise BadRow(uid, f"{kind}: {first_line(error)}") from error


def _scaled(values: np.ndarray) -> Image.Image:
    """8 bits of grey from 32-bit or floating point values (H, W), which `convert("RGB")` would clip to white or black.

    Floating point within 0 … 1, and values within 0 … 255, are of that range. All else is stretched from its least
    value to its largest. What is not finite is black.
    """
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    if low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if values.dtype.kind == "f" and high <= 1 else 255.0
    elif low == high:
        low = min(low, 0.0)
    share = (np.where(finite, values, low).astype(np.float64) - low) / ((high - low) or 1.0)
    return Image.fromarray(np.rint(255 * share).astype(np.uint8))


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

"""How an image becomes the input of a model: `--preprocess size=256,crop=224,mean=0.485:0.456:0.406,...`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_autoglm.errors import UserError

KEYS = ("size", "crop", "mean", "std", "layout", "gray", "scale")
_SIDE = 224  # where the model leaves height and width open


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Resize, crop, divide by `scale`, subtract `mean`, divide by `std`, and order the axes.

    `size` is a length for the shorter side, or (height, width); `crop` is (height, width), taken from the centre.
    `mean` and `std` have one number per channel, in units of the scaled image.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Literal["nchw", "nhwc"]
    gray: bool
    scale: float

    def __call__(self, file: Path) -> npt.NDArray[np.float32]:
        """One image as `[channels, height, width]` or `[height, width, channels]`. Raises UserError."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as opened:
                image = opened.convert("L" if self.gray else "RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the image {file}: {error}; remove it or save it again") from error
        width, height = _resized(image.size, self.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        rows, columns = self.crop
        top, left = (height - rows) // 2, (width - columns) // 2
        image = image.crop((left, top, left + columns, top + rows))
        scaled = np.asarray(image, np.float32).reshape(rows, columns, -1) / self.scale
        centred = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        pixels: npt.NDArray[np.float32] = centred.astype(np.float32)
        return pixels.transpose(2, 0, 1) if self.layout == "nchw" else pixels


def _resized(size: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int]:
    """The (width, height) to resize an image of (width, height) to."""
    if isinstance(wanted, tuple):
        return wanted[1], wanted[0]
    width, height = size
    if width <= height:
        return wanted, max(wanted, round(wanted * height / width))
    return max(wanted, round(wanted * width / height)), wanted


def plan_preprocess(text: str | None, image: ir.Value) -> Preprocess:
    """The steps that `--preprocess` asks for; what it leaves open follows from the shape of the input.

    Raises UserError for a key, a value or a shape that makes no sense.
    """
    given = parse(text or "")
    layout, channels, sides = _declared(image, given.get("layout"))
    gray = _flag(given["gray"]) if "gray" in given else channels == 1
    count = 1 if gray else 3
    if channels is not None and channels != count:
        raise UserError(
            f"--preprocess: images have {count} channels, input {image.name!r} takes {channels}: "
            f"set gray={'false' if channels == 3 else 'true'}, or pass .npz samples"
        )
    crop = _sides(given["crop"], "crop") if "crop" in given else None
    whole = _sides(given["size"], "size") if "size" in given else None
    exact = "x" in given.get("size", "")
    box = crop or sides or (whole if whole is not None else (_SIDE, _SIDE))
    size: int | tuple[int, int] = max(box)
    if whole is not None:
        size = whole if exact else whole[0]
    smallest = size if isinstance(size, tuple) else (size, size)
    if smallest[0] < box[0] or smallest[1] < box[1]:
        raise UserError(f"--preprocess: size={given.get('size')} is smaller than the crop {box[0]}x{box[1]}")
    is_float = image.dtype is None or image.dtype.is_floating_point()
    return Preprocess(
        size=size,
        crop=box,
        mean=_numbers(given.get("mean", "0"), "mean", count),
        std=_numbers(given.get("std", "1"), "std", count),
        layout=layout,
        gray=gray,
        scale=_numbers(given["scale"], "scale", 1)[0] if "scale" in given else 255.0 if is_float else 1.0,
    )


def parse(text: str) -> dict[str, str]:
    """`KEY=VALUE` texts joined by commas. Raises UserError."""
    result: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = item.partition("=")
        if key not in KEYS or not separator or not value:
            raise UserError(
                f"--preprocess: {item!r} is no KEY=VALUE with a key of {', '.join(KEYS)}; for example "
                "size=256,crop=224,mean=0.485:0.456:0.406,std=0.229:0.224:0.225"
            )
        if key in result:
            raise UserError(f"--preprocess: {key} is given twice")
        result[key] = value
    return result


def _declared(
    image: ir.Value, layout: str | None
) -> tuple[Literal["nchw", "nhwc"], int | None, tuple[int, int] | None]:
    """Layout, channels, and height and width where the model fixes them."""
    shape = [] if image.shape is None else [size if isinstance(size, int) else None for size in image.shape]
    if layout not in (None, "nchw", "nhwc"):
        raise UserError(f"--preprocess: layout={layout} is not known; it is nchw or nhwc")
    if len(shape) != 4:
        raise UserError(
            f"input {image.name!r} is no batch of images [batch, channels, height, width]: pass .npz"
        )
    last = shape[3] in (1, 3) and shape[1] not in (1, 3)
    nhwc = last if layout is None else layout == "nhwc"
    channels, height, width = (shape[3], shape[1], shape[2]) if nhwc else (shape[1], shape[2], shape[3])
    sides = None if height is None or width is None else (height, width)
    return ("nhwc" if nhwc else "nchw"), channels, sides


def _sides(text: str, key: str) -> tuple[int, int]:
    """`224`, or `224x320` for height and width."""
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"--preprocess: {key}={text} is no length in pixels; write {key}=224, or {key}=224x320"
        )
    return int(parts[0]), int(parts[-1])


def _numbers(text: str, key: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(":"))
    except ValueError:
        raise UserError(f"--preprocess: {key}={text} holds something that is no number") from None
    if len(numbers) not in (1, count):
        raise UserError(
            f"--preprocess: {key} has {len(numbers)} numbers and the image {count} channels; write one, or "
            f"{count} joined by colons"
        )
    if key != "mean" and not all(number > 0 for number in numbers):
        raise UserError(f"--preprocess: {key}={text} must be above zero")
    return numbers * (count // len(numbers))


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise UserError(f"--preprocess: gray={text} is not known; it is true or false")
    return text == "true"

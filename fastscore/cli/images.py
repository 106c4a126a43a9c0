"""A folder of unlabelled images, as batches."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastscore.cli import hugging_face
from fastscore.cli.checkpoints import sha256
from fastscore.cli.models import parse, timm_settings, torchvision_models, torchvision_weights
from fastscore.recovery.calibration import HELD_OUT
from fastscore.wording import counted

_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Preprocessing:
    """The shorter side becomes `resize`, the middle size x size is cut out, values in [0, 1] become (x - mean) / std.

    Attributes:
        resize, size: pixels.
        mean, std: one number for each of 3 channels (RGB) or 1 (grey).
        interpolation: torchvision's name for it.
        squash: both sides become `resize`, whatever the picture's shape.
        early: of an odd margin, the pixel more is cut off at the end (transformers), not as torchvision rounds.
        source: who says so.
    """

    resize: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    squash: bool = False
    early: bool = False
    source: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(f"mean and std must have 3 numbers each (RGB) or 1 (grey); they have {len(self.mean)} and "
                             f"{len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std: {self.std}; it is divided by, so it must be above 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what comes out."""
        return len(self.mean), self.size, self.size

    def __str__(self) -> str:
        numbers = [" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std)]
        plain = set(self.mean) == {0.0} and set(self.std) == {1.0}
        return (f"{'both sides' if self.squash else 'shorter side'} to {self.resize} pixels ({self.interpolation}), "
                f"the middle {self.size} x {self.size}, "
                + ("values in [0, 1]" if plain else f"mean {numbers[0]}, std {numbers[1]}")
                + (f" ({self.source})" if self.source else ""))

    def __call__(self, path: Path) -> Tensor:
        """Read one file: float32 [channels, size, size]. Raises ValueError, naming it, where it is no image."""
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
                    image = image.point(lambda value: value / 256).convert("L")
                image = image.convert("RGB" if len(self.mean) == 3 else "L")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all of these from Pillow
            raise ValueError(f"images: {path} cannot be decoded; remove or repair it ({error})") from error
        return self.prepare(image)

    def prepare(self, image: Any) -> Tensor:
        """A picture, PIL's or uint8 [channels, H, W]: float32 [channels, size, size]."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        sides = [self.resize] * (2 if self.squash else 1)
        image = F.resize(image, sides, InterpolationMode(self.interpolation), antialias=True)
        top, left = ((side - self.size) // 2 for side in F.get_size(image))
        middle = F.crop(image, top, left, self.size, self.size) if self.early else F.center_crop(image, [self.size])
        pixels = F.to_image(middle).as_subclass(Tensor)
        result: Tensor = F.normalize(F.to_dtype(pixels, torch.float32, scale=True), list(self.mean), list(self.std))
        return result


def preprocessing(spec: str, weights: str | None = None, size: int | None = None,
                  mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                  checkpoint: str | PathLike[str] | None = None) -> Preprocessing:
    """How the model `spec` (see fastscore.cli.models.load) wants its images.

    For torchvision and timm: the preprocessing of `weights`, of those of torchvision whose file `checkpoint` is, or of
    the default weights (mostly ImageNet). For hf: that of its image processor. For others only the size is asked for,
    and without mean and std values stay within [0, 1], which `source` says. size, mean, std: replace what is known.
    Raises ValueError where the size is not known, or the model takes no plain images.
    """
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and not all(0 <= value <= 1 for value in values):
            raise ValueError(f"{name}: {' '.join(f'{value:g}' for value in values)}; pixels are in [0, 1]: divide "
                             "--mean and --std by 255 where they are meant for pixels up to 255")
    known = {"torchvision": _of_torchvision, "timm": _of_timm, "hf": _of_hugging_face}.get(parse(spec)[0])
    if known is None:
        if size is None:
            raise ValueError(f"size: {spec} does not say how large its images are; give --size")
        channels = len(mean or std or (0, 0, 0))
        half = "mean as given, std " if mean else "std as given, mean " if std else ""
        return Preprocessing(size, size, tuple(mean or (0.0,) * channels), tuple(std or (1.0,) * channels),
                             source="as given" if mean and std else
                             f"{half}assumed: {spec} does not say what it was trained with; --mean and --std do")
    base = known(spec, weights, checkpoint)
    given = [name for name, value in (("size", size), ("mean", mean), ("std", std)) if value is not None]
    source = base.source + (f", but for {', '.join(given)} as given" if given else "")
    if size is not None:
        source += f"; its size is {base.size}"
        base = replace(base, size=size, resize=round(size * base.resize / base.size))
    return replace(base, mean=tuple(mean or base.mean), std=tuple(std or base.std), source=source)


def _of_torchvision(spec: str, weights: str | None, checkpoint: str | PathLike[str] | None) -> Preprocessing:
    entry = torchvision_weights(spec, weights or "DEFAULT")
    said = ""
    if checkpoint is not None:
        found = sha256(checkpoint) if Path(checkpoint).is_file() else ""
        same = [each for each in type(entry) if found and f"-{found[:8]}." in each.url]  # as torchvision names files
        entry, said = (same[0], ", whose file it is") if same else (entry, f", assumed for {checkpoint}")
    preset: Any = entry.transforms()
    if not hasattr(preset, "crop_size"):
        raise ValueError(f"model: {spec} is not an image classifier")
    return Preprocessing(preset.resize_size[0], preset.crop_size[0], tuple(preset.mean), tuple(preset.std),
                         preset.interpolation.value, source=f"as torchvision's {entry}{said}")


def _of_timm(spec: str, weights: str | None, checkpoint: str | PathLike[str] | None) -> Preprocessing:
    known = timm_settings(spec, weights)
    size, crop = known.input_size[-1], known.crop_mode
    return Preprocessing(math.floor(size / known.crop_pct), size, tuple(known.mean), tuple(known.std),
                         known.interpolation, squash=crop == "squash",
                         source=f"as timm's {known.architecture}.{known.tag}"
                         + ("" if crop in ("center", "squash") else f", whose crop mode {crop} is replaced")
                         + ("" if checkpoint is None else f", assumed for {checkpoint}"))


def _of_hugging_face(spec: str, weights: str | None, checkpoint: str | PathLike[str] | None) -> Preprocessing:
    """What its image processor says, held against what the processor makes of a picture."""
    name = parse(spec)[1]
    processor = hugging_face.processor(name)
    refused = ValueError(f"model: {spec}: its {type(processor).__name__} does more than to resize to a square, crop "
                         "its middle and normalise; write a function that returns the model, and give --size, --mean, "
                         "--std")
    size, crop = (dict(getattr(processor, key, None) or {}) for key in ("size", "crop_size"))
    squash = "height" in size
    resize = size.get("height", size.get("shortest_edge"))
    middle = crop.get("height") if getattr(processor, "do_center_crop", None) else resize
    part = getattr(processor, "crop_pct", None)  # ConvNeXt's: of the shorter side, below 384 pixels
    if part is not None and resize is not None:
        squash, resize = resize >= 384, resize if resize >= 384 else int(resize / part)
    if resize is None or middle is None or not getattr(processor, "do_resize", True):
        raise refused
    normalised = getattr(processor, "do_normalize", True)
    found = Preprocessing(
        resize, middle, tuple(processor.image_mean) if normalised else (0.0,) * 3,
        tuple(processor.image_std) if normalised else (1.0,) * 3, _RESAMPLING.get(int(processor.resample), "bilinear"),
        squash, early=True, source=f"as the {type(processor).__name__} of {spec}")
    for width in (410, 423, 436):  # odd margins and even ones
        pixels = torch.randint(256, (3, 290, width), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
        theirs, ours = hugging_face.processed(processor, pixels), found.prepare(pixels)
        if theirs.shape != ours.shape or float((theirs - ours).abs().max()) > 4 / 255 / min(found.std):
            raise refused
    return found


def find(folder: str | PathLike[str], samples: int | Literal["auto"] | None = None, seed: int = 0, *,
         named: str = "images") -> list[Path]:
    """The images in `folder` and below, links followed, hidden ones aside: all, sorted, or `samples` drawn with `seed`.

    "auto": all, in an order drawn with `seed`, so that the first few stand for all.

    named: the argument that errors name. Raises ValueError where there is no image, or fewer than `samples`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{named}: {root} is not a folder, but a file; give {root.parent}, or a folder of images"
                         if root.is_file() else f"{named}: there is no folder {root} (looked in {Path.cwd()})")
    paths = sorted(path for path in _shown(root, frozenset()) if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{named}: there is none in {root} (looked for {', '.join(SUFFIXES)}); name a "
                         "folder of some")
    if samples is None:
        return paths
    if samples != "auto" and samples > len(paths):
        raise ValueError(f"samples: {samples}, but {root} holds {counted(len(paths), 'image')}: give "
                         f"samples={len(paths)} or fewer, or more images")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))
    if samples == "auto":
        return [paths[i] for i in order.tolist()]
    return sorted(paths[i] for i in order[:samples].tolist())


def apart(paths: list[Path], folder: str | None) -> tuple[list[Path], list[Path]]:
    """(images that score and repair, images that judge: those of `folder`, or else one of four)

    Raises ValueError where there are too few, or one is both.
    """
    if folder is None:
        if len(paths) < HELD_OUT:
            raise ValueError(f"images: {len(paths)}, and one of {HELD_OUT} is held out to judge by; give "
                             f"{HELD_OUT} or more")
        held_out = paths[HELD_OUT - 1::HELD_OUT]
        return [path for number, path in enumerate(paths, 1) if number % HELD_OUT], held_out
    held_out = find(folder, named="held-out")
    if both := {path.resolve() for path in paths} & {path.resolve() for path in held_out}:
        raise ValueError(f"held-out: {folder} and --images share {counted(len(both), 'image')}, {min(both).name} for "
                         "one; give a folder of others")
    return paths, held_out


def _shown(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """The files in `folder` and below whose names, and folders, do not begin with a dot; above: where it lies, so that
    a link back to there ends."""
    within = above | {folder.resolve()}
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in within:
            yield from _shown(path, within)


KEPT = 1 << 29  # bytes of images that are read several times: a photograph may take longer to decode than to score


class ImageBatches:
    """Batches float32 [N, channels, size, size] of image files, N = batch_size but for the last.

    A slice of them is a share of the batches, and reads nothing. Iterating decodes the next batch ahead.

    kept: file -> what was made of it, of as many as KEPT has room for, where batches are read several times.
    """

    def __init__(self, chunks: Sequence[Sequence[Path]], prepare: Preprocessing,
                 kept: dict[Path, Tensor] | None = None) -> None:
        self.chunks, self.prepare, self._kept = chunks, prepare, kept

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and order of the files, of where batches begin, and of the preprocessing."""
        digest = hashlib.sha256(repr(self.prepare).encode())
        for chunk in self.chunks:
            digest.update(repr([(str(path), path.stat().st_size) for path in chunk]).encode())
        return digest.hexdigest()

    def first(self, samples: int) -> "ImageBatches":
        """The first `samples` images."""
        starts = itertools.accumulate(map(len, self.chunks), initial=0)
        return ImageBatches([chunk[:samples - start] for start, chunk in zip(starts, self.chunks, strict=False)
                             if start < samples], self.prepare, self._kept)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, part: slice) -> "ImageBatches":
        return ImageBatches(self.chunks[part], self.prepare, self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        with ThreadPoolExecutor() as pool:  # decoding releases the GIL
            ahead: list[Future[Tensor]] = []
            for chunk in [*self.chunks, ()]:
                ready, ahead = ahead, [pool.submit(self._read, path) for path in chunk]
                if ready:
                    yield torch.stack([future.result() for future in ready])

    def _read(self, path: Path) -> Tensor:
        kept = {} if self._kept is None else self._kept
        if (found := kept.get(path)) is None:
            found = self.prepare(path)
            if (len(kept) + 1) * found.nbytes <= KEPT:
                kept[path] = found
        return found


def batches(paths: Sequence[Path], prepare: Preprocessing, batch_size: int, keep: bool = False) -> ImageBatches:
    """The images in batches of `batch_size`, kept once they are read where they are read several times. Raises
    ImportError, saying what to install, without torchvision."""
    torchvision_models()
    chunks = [paths[start:start + batch_size] for start in range(0, len(paths), batch_size)]
    return ImageBatches(chunks, prepare, {} if keep else None)

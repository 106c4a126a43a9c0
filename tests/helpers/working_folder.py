"""A working directory for commands: nets.py with networks of one's own, and images in photos/."""

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor


def enter(place: Path, monkeypatch: pytest.MonkeyPatch, nets: str, photos: Iterable[Tensor] = ()) -> None:
    """Work in `place`, with nets.py, which is imported anew, and photos/00.png and so on of uint8 [H, W, 3]."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "nets.py").exists()])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    Path("nets.py").write_text(nets)
    write_photos(place / "photos", photos)


def write_photos(folder: Path, photos: Iterable[Tensor]) -> None:
    """photos: uint8 [H, W, 3]."""
    folder.mkdir()
    for number, image in enumerate(photos):
        Image.fromarray(image.numpy()).save(folder / f"{number:02}.png")

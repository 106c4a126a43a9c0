import shutil
from pathlib import Path

import photographed
import pytest
import safetensors.torch
import sklearn.datasets
import torch
import working_folder
from PIL import Image

from fastscore.cli import models


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two photographs, and of files that are none."""
    photos: Path = tmp_path_factory.mktemp("photographs") / "photos"
    (photos / "flowers").mkdir(parents=True)
    for name, pixels in zip(("china.png", "flowers/flower.JPG"), sklearn.datasets.load_sample_images().images,
                            strict=True):
        Image.fromarray(pixels).save(photos / name)
    (photos / ".hidden.jpg").write_text("not an image")
    (photos / "notes.txt").write_text("not an image")
    return photos


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: Path) -> Path:
    """A working directory with nets.py, its checkpoint net.safetensors, and two photographs in photos/."""
    working_folder.enter(tmp_path, monkeypatch, photographed.NETS)
    torch.manual_seed(1)
    safetensors.torch.save_file(models.load("nets:build", seed=7).state_dict(), "net.safetensors")
    shutil.copytree(photographs, "photos", dirs_exist_ok=True)
    return tmp_path

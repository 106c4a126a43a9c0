"""Runs over folders of images that go on: what is done is not decoded again."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from test_resume import RESIDUAL, assert_same_bits, score
from torch import Tensor

from fastscore.cli import images
from fastscore.scoring import run_file, runs


@pytest.fixture(autouse=True)
def _every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after each batch, however long it takes."""
    monkeypatch.setattr(run_file, "SHARE", float("inf"))


class TestImages:
    """Folders of images: what is done is not decoded again, and what is there is known by name and size."""

    PREPARE = images.Preprocessing(8, 8, (0.5,) * 3, (0.25,) * 3)

    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        (tmp_path / "photos").mkdir()
        for number, pixels in enumerate((RESIDUAL.inputs(11).movedim(1, -1) * 50 + 128).clamp(0, 255).byte()):
            Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{number:02}.png")
        return images.find(tmp_path / "photos")

    def test_goes_on(self, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = RESIDUAL.traced(dtype=torch.float32)
        whole = score(images.batches(paths, self.PREPARE, 3), model, samples=10)
        decoded: list[str] = []
        original = images.Preprocessing.__call__

        def decode(self: images.Preprocessing, path: Path) -> Tensor:
            decoded.append(path.name)
            if path.name == fails:
                raise RuntimeError("stopped")
            return original(self, path)

        monkeypatch.setattr(images.Preprocessing, "__call__", decode)
        fails = "07.png"
        with pytest.raises(RuntimeError, match="stopped"):
            score(images.batches(paths, self.PREPARE, 3), model, samples=10, resume=tmp_path / "s.ckpt")
        fails = ""
        decoded.clear()
        resumed = score(images.batches(paths, self.PREPARE, 3), model, samples=10, resume=tmp_path / "s.ckpt")
        assert sorted(decoded) == ["00.png", "01.png", "02.png", "06.png", "07.png", "08.png", "09.png"]
        assert_same_bits(resumed, whole)

    def test_another_folder(self, paths: list[Path], tmp_path: Path) -> None:
        model, batches = RESIDUAL.traced(dtype=torch.float32), images.batches(paths, self.PREPARE, 3)
        score(batches, model, resume=tmp_path / "s.ckpt")
        other = images.Preprocessing(8, 8, (0.4,) * 3, (0.25,) * 3)
        for batches in (images.batches(paths[1:], self.PREPARE, 3), images.batches(paths, self.PREPARE, 4),
                        images.batches(paths[::-1], self.PREPARE, 3), images.batches(paths, other, 3)):
            with pytest.raises(ValueError, match="differs in data;"):
                score(batches, model, resume=tmp_path / "s.ckpt")
        Image.new("RGB", (640, 480)).save(paths[5])
        with pytest.raises(ValueError, match="differs in data;"):
            score(images.batches(paths, self.PREPARE, 3), model, resume=tmp_path / "s.ckpt")

    def test_slices_hold_every_image_once(self, paths: list[Path]) -> None:
        batches = images.batches(paths, self.PREPARE, 3)
        assert isinstance(batches, runs.SliceableBatches)
        shares = [torch.cat(list(batches[rank::3])) for rank in range(3)]
        assert [len(share) for share in shares] == [5, 3, 3]
        whole = torch.cat(list(batches))
        assert torch.equal(torch.cat(shares), torch.cat([whole[0:3], whole[9:], whole[3:6], whole[6:9]]))
        assert [len(batch) for batch in batches.first(7)] == [3, 3, 1]
        assert [len(batch) for batch in batches.first(6)] == [3, 3]

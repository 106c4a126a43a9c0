"""What contributors read is true: files that are named are there, and what is said in several places is said alike."""

import re
from pathlib import Path

import pytest

import fastscore
from fastscore import cli

ROOT = Path(__file__).parents[2]
PAGES = ("CONTRIBUTING.md", "docs/architecture.md", "benchmarks/README.md", "docs/versions.md")


@pytest.mark.parametrize("page", PAGES)
def test_its_files_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"(?<![\w/.])((?:fastscore|csrc|tests|benchmarks|docs)/[\w./-]*)", text)
    assert named
    for name in named:
        assert list(ROOT.glob(name.rstrip("/.") + "*")), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_the_version_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    version = fastscore.__version__
    assert '\nversion = {attr = "fastscore.__version__"}\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert (leaving.value.code, capsys.readouterr().out) == (0, f"fastscore {version}\n")


def test_the_licence_is_said_alike() -> None:
    found = re.search(r'^license = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    text = (ROOT / "LICENSE").read_text()
    assert f"SPDX-License-Identifier: {found[1]}\n" in text
    assert f"https://spdx.org/licenses/{found[1]}.html" in text
    assert f"\nlicense: {found[1]}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_cpp_standard_is_said_alike() -> None:
    sources = [path for name in ("setup.py", "README.md", "CONTRIBUTING.md", "docs", "csrc", "fastscore", "tests")
               for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
               if path.suffix in (".py", ".md", ".h", ".cpp", ".cu", ".cuh")]
    said = {number for path in sources for number in re.findall(r"(?i)\bc\+\+(\d\d)\b", path.read_text())}
    assert said == {"20"}

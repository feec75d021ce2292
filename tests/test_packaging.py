"""The package as users get it: built, installed, and used away from the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import learnedopt

ROOT = Path(__file__).resolve().parents[1]

USE_EVERYTHING = """
import importlib.util, pathlib, pkgutil, sys
import torch
import learnedopt
from learnedopt.optim import LearnedOptimizer
from learnedopt.zoo import list_entries, load_rule

assert pathlib.Path(learnedopt.__file__).is_relative_to(sys.argv[1]), learnedopt.__file__
for module in pkgutil.walk_packages(learnedopt.__path__, "learnedopt."):
    if not module.name.endswith(".triton") or importlib.util.find_spec("triton"):
        importlib.import_module(module.name)
for name in list_entries():
    load_rule(name)
    LearnedOptimizer([torch.nn.Parameter(torch.ones(3))], rule=name)
print(*list_entries())
"""

USE_HUB = """
import sys
import torch

root = sys.argv[1]
torch.hub.load(root, "rule", "default", source="local")
torch.hub.load(root, "learned_optimizer", [torch.nn.Parameter(torch.ones(3))], lr=0.5, source="local").step()
"""


def entries() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("zoo/*/config.json"))


def run(*command: str | Path, cwd: Path, pythonpath: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source archive, and the wheel built from that archive alone."""
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


def test_the_wheel_holds_the_package_and_the_zoo(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(ROOT)) for path in ROOT.glob("learnedopt/**/*.py")}
    zoo = {f"learnedopt/{path.relative_to(ROOT)}" for path in ROOT.glob("zoo/**/*") if path.is_file()}
    splits = {str(path.relative_to(ROOT)) for path in ROOT.glob("learnedopt/fewshot/splits/*.json")}
    assert names >= {"learnedopt/py.typed", *package, *zoo, *splits}
    assert {name.split("/")[0] for name in names} == {"learnedopt", f"learnedopt-{learnedopt.__version__}.dist-info"}


def test_the_source_archive_holds_what_the_results_rest_on(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames()}
    folders = ("tests", "meta_training", "benchmarks")
    expected = {str(path.relative_to(ROOT)) for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")}
    expected |= {"LICENSE", "CHANGELOG.md", "conftest.py", "hubconf.py"}
    assert names >= expected | {f"zoo/{name}/card.md" for name in entries()}


def test_the_installed_wheel_works_away_from_the_repository(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", site, wheel, cwd=tmp_path)
    output = run("-W", "error", "-c", USE_EVERYTHING, site, cwd=tmp_path, pythonpath=site)
    assert output.split() == entries()


def test_a_bare_checkout_works_through_torch_hub(tmp_path: Path) -> None:
    run("-W", "error", "-c", USE_HUB, ROOT, cwd=tmp_path)


def test_every_file_states_the_same_version() -> None:
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changelog = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation is not None and citation[1] == learnedopt.__version__
    assert changelog is not None and changelog[1] == learnedopt.__version__

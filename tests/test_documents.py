"""What the documents tell people to run, runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from learnedopt import zoo
from learnedopt.meta import MetaTrainingRun, load_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_every_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    accuracy = re.search(r"test accuracy: (.+) %", capsys.readouterr().out)
    assert accuracy is not None
    assert float(accuracy[1]) > 90


def test_the_recipe_of_the_readme_trains(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(# mine\.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "mine.py").write_text(blocks[0])
    recipe = load_recipe(tmp_path / "mine.py")
    assert recipe.name == "mine"
    records = list(MetaTrainingRun(recipe, tmp_path / "run").run(time_limit=0.0))
    assert [record["update"] for record in records] == [1]


def test_the_readme_names_the_entries_of_the_zoo() -> None:
    listed = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(zoo.list_entries()) <= set(listed)


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []

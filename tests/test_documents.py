"""What the documents tell people to run, runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from learnedopt import zoo
from learnedopt.meta import ESTIMATORS, load_recipe
from learnedopt.runs import Run

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_every_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    accuracy = re.search(r"test accuracy: (.+) %", capsys.readouterr().out)
    assert accuracy is not None
    assert float(accuracy[1]) > 90


@pytest.mark.parametrize(
    ("document", "name"), [("README.md", "mine"), ("docs/meta_training.md", "mine"), ("docs/meta_training.md", "tuned")]
)
def test_the_recipe_of_a_document_trains(document: str, name: str, tmp_path: Path) -> None:
    blocks = re.findall(rf"```python\n(# {name}\.py\n.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert len(blocks) == 1
    file = tmp_path / f"{name}.py"
    file.write_text(blocks[0])
    recipe = load_recipe(file)
    assert recipe.name == name
    records = list(Run(recipe, tmp_path / "run").run(time_limit=0.0))
    assert [record["update"] for record in records] == [1]


def test_the_readme_names_the_entries_of_the_zoo() -> None:
    listed = re.findall(r"^\| `([a-z0-9-]+)`(?:, the .*?)? \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(zoo.list_entries()) <= set(listed)


def test_the_guide_keeps_to_fifteen_lines() -> None:
    (block,) = re.findall(r"```python\n# mine\.py\n(.*?)```", (ROOT / "docs/meta_training.md").read_text(), re.DOTALL)
    code = [line for line in block.splitlines() if line.strip()]
    assert len(code) <= 15


def test_the_guide_names_every_estimator() -> None:
    text = (ROOT / "docs/meta_training.md").read_text()
    for name, estimator in ESTIMATORS.items():
        assert f"| `{name}` | `{estimator.__name__}` |" in text


DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []

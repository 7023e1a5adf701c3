"""The figures of docs/results.md, docs/flags.md and the README are those of the files beside them."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="no docs beside the tests")


def differing(docs, monkeypatch, capsys):
    """Exit status and words of `python docs/figures/results.py --check`, of the script that lies there."""
    script = docs / "figures/results.py"
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(script.parent))
        patched.setattr(sys, "argv", [str(script), "--check"])
        spec = importlib.util.spec_from_file_location("results_script", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules.pop("flag_tables")
        return module.main(), capsys.readouterr().out


def test_the_tables_are_what_the_files_say(monkeypatch, capsys):
    status, told = differing(DOCS, monkeypatch, capsys)
    assert status == 0, told


def test_a_changed_figure_is_noticed(tmp_path, monkeypatch, capsys):
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    shutil.copytree(DOCS / "figures", docs / "figures")
    (docs / "results/flat").symlink_to(DOCS / "results/flat")
    (docs / "flags").mkdir()
    for page in ("../README.md", "results.md", "results/flat.md", "flags.md"):
        shutil.copy(DOCS / page, docs / page)
    assert differing(docs, monkeypatch, capsys)[0] == 0
    in_table = r"(?m)^(\| base model .* 0)\."
    for page, figure, other in (
        ("docs/results/flat.md", in_table, r"\1.9"),
        ("docs/results.md", r"\| \+\d+% \(", "| +99% ("),
        ("README.md", r"\| \+\d+% \(", "| +99% ("),
    ):
        text = (tmp_path / page).read_text()
        changed = re.sub(figure, other, text, count=1)
        assert changed != text
        (tmp_path / page).write_text(changed)
        status, told = differing(docs, monkeypatch, capsys)
        assert status == 1 and f"{page} differs" in told, told
        (tmp_path / page).write_text(text)


def test_a_place_that_is_missing_is_said(tmp_path, monkeypatch, capsys):
    docs = tmp_path / "docs"
    shutil.copytree(DOCS / "figures", docs / "figures")
    (docs / "results/flat").mkdir(parents=True)
    (docs / "flags").mkdir()
    for file in sorted((DOCS / "results/flat").glob("*-seed0.json")):
        shutil.copy(file, docs / "results/flat")
    (docs / "results.md").write_text("# Results")
    shutil.copy(DOCS.parent / "README.md", tmp_path)
    with pytest.raises(
        SystemExit, match=r"one place for flat, between <!-- flat --> .* got 0 in docs/results\.md"
    ):
        differing(docs, monkeypatch, capsys)

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
    shutil.copy(DOCS.parent / "README.md", tmp_path)
    shutil.copy(DOCS / "flags.md", docs)
    page = (DOCS / "results.md").read_text()
    table = page.partition("<!-- flat -->")[2]
    line = next(line for line in table.splitlines() if line.startswith("| base model"))
    (docs / "results.md").write_text(page)
    assert differing(docs, monkeypatch, capsys)[0] == 0
    (docs / "results.md").write_text(page.replace(line, line.replace("0.", "1.")))
    status, told = differing(docs, monkeypatch, capsys)
    assert status == 1 and "docs/results.md differs" in told, told
    (docs / "results.md").write_text(page)
    readme = (tmp_path / "README.md").read_text()
    changed = re.sub(r"\| \+\d+% \(", "| +99% (", readme, count=1)
    assert changed != readme
    (tmp_path / "README.md").write_text(changed)
    status, told = differing(docs, monkeypatch, capsys)
    assert status == 1 and "README.md differs" in told, told

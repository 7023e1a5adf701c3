"""The figures of docs/results.md are those of the files beside it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.skipif(not DOCS.is_dir(), reason="no docs beside the tests")
def test_the_tables_are_what_the_files_say():
    command = [sys.executable, str(DOCS / "figures/results.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_figure_is_noticed(tmp_path):
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    shutil.copytree(DOCS / "figures", docs / "figures")
    (docs / "results/flat").symlink_to(DOCS / "results/flat")
    (docs / "flags").mkdir()
    shutil.copy(DOCS / "flags.md", docs)
    page = (DOCS / "results.md").read_text()
    table = page.partition("<!-- flat -->")[2]
    line = next(line for line in table.splitlines() if line.startswith("| base model"))
    (docs / "results.md").write_text(page.replace(line, line.replace("0.", "1.")))
    done = subprocess.run(
        [sys.executable, str(docs / "figures/results.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "differs" in done.stdout, done.stdout + done.stderr

"""The benchmark for a GPU runs through on a small model, and counts what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no benchmarks beside the tests")


def test_it_runs_small(tmp_path):
    """Sampled are 4 x 4 rows with guidance; learned from, forward and backward, 2 x 3 with guidance."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--small", "--iterations", "1"], capture_output=True, text=True, cwd=tmp_path, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert {"rollout", "reward", "diversity", "update", "all"} <= set(result["seconds"])
    row = 2 * 408.6e6  # of the embedded model, a multiplication and an addition each
    denoising = 2 * (4 * 4 + 2 * 2 * 3) * row
    assert denoising < result["operations"] < 1.5 * denoising  # and the decoding
    assert "|ratio - 1|" in done.stdout

"""Benchmarks that only some machines can make use of still run, and count what they should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="no benchmarks beside the tests")


@pytest.mark.slow
def test_estimates_can_be_compared(tmp_path):
    """Their seconds and bytes; how near they are is for a quiet machine to say."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / "estimate.py", "--only", "lora", "--kind", "estimated"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    assert seconds > 0 and memory > 2**28


@pytest.mark.slow
def test_the_one_for_a_gpu_runs_small(tmp_path):
    """Sampled are 4 x 4 rows with guidance; learned from, forward and backward, 2 x 3 with guidance."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / "gpu.py", "--small", "--iterations", "1"], capture_output=True, text=True, cwd=tmp_path, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert {"rollout", "reward", "diversity", "update", "all"} <= set(result["seconds"])
    row = 2 * 408.6e6  # of the embedded model, a multiplication and an addition each
    denoising = 2 * (4 * 4 + 2 * 2 * 3) * row
    assert denoising < result["operations"] < 1.5 * denoising  # and the decoding
    assert "|ratio - 1|" in done.stdout

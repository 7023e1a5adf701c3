"""The command line of the benchmark beside other trainers; the rivals themselves are not at hand in tests."""

import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parents[1] / "benchmarks/peers.py"


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PEERS, *options], capture_output=True, text=True, check=False, timeout=60
    )


def test_help_names_the_checkout_of_ddpo_pytorch():
    done = run("--help")
    assert done.returncode == 0
    assert "--ddpo PATH" in done.stdout


def test_a_folder_that_is_no_checkout_is_refused_before_anything_is_installed(tmp_path):
    (tmp_path / "checkout/scripts").mkdir(parents=True)
    (tmp_path / "checkout/scripts/train.py").touch()
    environments = [f"--{name}={tmp_path / name}" for name in ("environment", "ddpo-environment")]
    for checkout in (tmp_path / "checkout", tmp_path / "nowhere"):
        done = run("--ddpo", checkout, *environments)
        assert done.returncode == 2
        message = done.stderr.splitlines()
        assert len(message) == 1
        assert str(checkout) in message[0]
        assert "ddpo_pytorch/rewards.py" in message[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkout"]

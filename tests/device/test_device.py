"""What a GPU would refuse is refused without one: `check.py`, on a device that computes on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=SLOW)])
def test_another_device(which):
    """In a process of its own, for torch never forgets a device."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", which]
    file = Path(__file__).with_name("check.py")
    found = subprocess.run([*command, file], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout

"""The example of workers that come and go, as a user starts it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'lightning-adpsgd[elastic]'")
pytestmark = pytest.mark.workers


def test_the_elastic_example_survives_the_loss_of_a_worker(tmp_path):
    example = [str(ROOT / "examples" / "elastic.py"), "--epochs", "8", "--lose", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_adpsgd", "elastic", "--workers", "2", "--max-restarts", "0", *example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1  # worker 1 is given up on
    assert "worker 1 has ended: killed by SIGKILL." in done.stderr
    assert "[worker 0] step 100, 2 workers in the latest round\n" in done.stdout
    assert "[worker 0] step 150, 1 workers in the latest round\n" in done.stdout
    assert float(re.search(r"\[worker 0\] test accuracy ([\d.]+)%", done.stdout)[1]) > 80

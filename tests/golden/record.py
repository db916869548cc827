"""Record golden.json from the code at hand, then run everything once more against it.

    python tests/golden/record.py

Byte for byte is a promise of one machine. On another one, or beside other packages, tests/test_golden.py compares
numbers to 1e-6 and no weights. To compare everything there too, record anew from the commit that you trust, and carry
the file over to the commit that you doubt:

    git worktree add ../trusted COMMIT
    PYTHONPATH=../trusted/src python tests/golden/record.py
    python -m pytest -m '' tests/test_golden.py

A change that is meant to change numbers is recorded in its own commit, which says why; the differences of golden.json
then show which.
"""

import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    test = [sys.executable, "-m", "pytest", "-m", "", str(Path(__file__).parents[1] / "test_golden.py")]
    for how in ("record", "compare"):
        status = subprocess.run(test, env=os.environ | {"TAID_GOLDEN": how}, check=False).returncode
        if status:
            sys.exit(f"tests/golden/record.py: could not {how}, so that golden.json is not to be trusted")

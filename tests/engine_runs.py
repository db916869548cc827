"""Several runs of the command line, one after another, in the processes of one engine; started by test_engines.py.

python -m accelerate.commands.launch --config_file FILE --num_processes N tests/engine_runs.py runs.json
"""

import json
import sys
import traceback
from pathlib import Path

from taid.cli.main import main
from taid.training import engines

if __name__ == "__main__":
    for number, arguments in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        try:
            status = main(arguments)
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
        if status:
            sys.exit(f"run {number} ended with status {status}: {arguments}")
    engines.leave(0)

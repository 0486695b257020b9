"""Peak memory of bulk sampling, which must not grow with the number of images.

`python -m benchmarks.memory`
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

from benchmarks.measuring import write

CODE = """
import resource, sys
from ddim.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main(numbers: tuple[int, ...] = (8, 64, 512), steps: int = 2) -> None:
    """Measure and write results/memory.json."""
    rows = []
    for n in numbers:
        with tempfile.TemporaryDirectory() as folder:
            words = ["sample", "mnist", "-n", str(n), "--steps", str(steps), "--out", f"{folder}/out"]
            process = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True)
        rows.append({"pictures": n, "peak MiB": float(process.stdout.split()[-1])})
    write("memory", rows, f"largest resident size of `ddim sample mnist --steps {steps}`")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.gpu [--device cuda] [--minutes 8] [--out FILE.json] [--tiny]`."""

import sys
import time

STARTED = time.monotonic()  # before torch and diffusers are imported, which takes seconds

try:
    from benchmarks.gpu.run import main
except ModuleNotFoundError as error:
    print(f"error: {error.name}: is not installed; install this package's extra `interop`", file=sys.stderr)
    sys.exit(1)

if __name__ == "__main__":
    sys.exit(main(started=STARTED))

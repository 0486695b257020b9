"""Runs all benchmarks: `python -m benchmarks`."""

from __future__ import annotations

import time

from benchmarks import loop, memory, precision, roofline, sampling, startup, table, training

for module in (loop, startup, memory, precision, roofline, training, sampling):
    started = time.monotonic()
    print(f"== {module.__name__.split('.')[-1]}", flush=True)
    module.main()
    print(f"   ({time.monotonic() - started:.0f} s)", flush=True)
table.main()
print(f"written: {table.PAGE}")

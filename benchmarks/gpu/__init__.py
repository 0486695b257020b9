"""Benchmarks on one NVIDIA GPU within a time limit: `python -m benchmarks.gpu`.

Where the package is not installed: `PYTHONPATH=src python -m benchmarks.gpu`. A trial of the code on any machine,
without measurements: `python -m benchmarks.gpu --device cpu --tiny`.

Cells run in order of importance. The cost of each is predicted from earlier measurements, and cells that do not fit
into the time limit are skipped and listed. The results are written after every part. A part that takes much longer than
predicted, as torch.compile may, is cut off at the time limit, and the process ends. A second call on the same machine
reuses Inductor's cache on disk, so that it measures more; `--only` chooses parts.
"""

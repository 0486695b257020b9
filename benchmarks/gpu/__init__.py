"""Speed on one NVIDIA GPU, all of it in one call that ends in time: `python -m benchmarks.gpu`.

Where the package is not installed: `PYTHONPATH=src python -m benchmarks.gpu`. A trial of the code on any machine, which
measures nothing: `python -m benchmarks.gpu --device cpu --tiny`.

Time is short where a GPU is lent, so not every cell of the plan may fit. Cells run in order of importance; the cost of
each is predicted from what was measured before it, and what does not fit is left out and listed, never silently. The
results are written after every part. A part that takes much longer than predicted, as torch.compile may, is cut off
when the time is over, and the process ends. A second call on the same machine finds what the first compiled in
Inductor's cache on disk, so that it comes further; `--only` chooses parts.
"""

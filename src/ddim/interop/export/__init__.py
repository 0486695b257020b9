"""Programs for other runtimes: a network, or a whole sampler, as ONNX or as a `torch.export` program.

A network takes x_t, the time in our counting 1..T and, where it has them, labels. A sampler takes x_T and gives x_0:
the plan's weights and the conditions of all its times are constants of the program. Both take any number of samples. A
sampler is a plan without noise: another runtime's generator would not draw the same.
"""

from ddim.interop.export.programs import NetworkProgram, SamplerProgram
from ddim.interop.export.write import Exported, export, iter_export

__all__ = [
    "Exported",
    "NetworkProgram",
    "SamplerProgram",
    "export",
    "iter_export",
]

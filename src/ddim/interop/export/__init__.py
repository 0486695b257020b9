"""Export of a network, or of a whole sampler, as an ONNX or `torch.export` program.

A network maps x_t, t in 1..T and, if it has classes, labels to its prediction. A sampler maps x_T, and labels, to x_0;
the plan's weights and the time embeddings are constants of the program. Both accept any number of samples. A sampler
must be a plan without noise, because another runtime's generator would draw other numbers.
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

"""Sample quality (section 5 of the paper): FID, KID, precision and recall of images from any source; likelihoods.

from ddim import evaluation

digits = evaluation.load_extractor("digits28")
real = evaluation.measure(ddim.data.load("./mnist"), digits)
samples = evaluation.measure(model.sample(1000), digits)
evaluation.distances(samples, real)

Imports from `model`, `train` and the layers below them.
"""

from ddim.evaluation.consistency import Consistency, consistency
from ddim.evaluation.distances import distances
from ddim.evaluation.extractors import from_module
from ddim.evaluation.extractors import load as load_extractor
from ddim.evaluation.features import Extractor
from ddim.evaluation.image_sets import ImageSource, from_arrays, from_data, from_model, iter_measure, measure
from ddim.evaluation.inception import inception
from ddim.evaluation.moments import Moments, frechet
from ddim.evaluation.statistics import Protocol, Statistics, check_comparable
from ddim.evaluation.statistics import read as read_statistics

__all__ = [
    "Consistency",
    "Extractor",
    "ImageSource",
    "Moments",
    "Protocol",
    "Statistics",
    "check_comparable",
    "consistency",
    "distances",
    "frechet",
    "from_arrays",
    "from_data",
    "from_model",
    "from_module",
    "inception",
    "iter_measure",
    "load_extractor",
    "measure",
    "read_statistics",
]

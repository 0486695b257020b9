"""Noise schedules: the float64 log signal-to-noise ratio at each timestep.

Notation of the whole package (t = 0 is clean data, t = T the noisiest timestep):

| code        | DDIM paper      | DDPM paper  | meaning                                                          |
|-------------|-----------------|-------------|------------------------------------------------------------------|
| `alpha_bar` | alpha_t         | bar alpha_t | signal power, cumulative; 1 at t = 0                             |
| `log_snr`   | -               | -           | log(alpha_bar / (1 - alpha_bar)); +inf at t = 0                  |
| `signal`    | sqrt(alpha_t)   |             | factor of x_0                                                    |
| `noise`     | sqrt(1-alpha_t) |             | factor of eps; never called sigma                                |
| `sigma`     | sigma_t         |             | std of the noise a reverse step adds, eq. (16), `ddim.gaussian`  |
| `angle`     | -               | -           | arccos(signal); a DDIM step rotates by the change of angle       |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ddim._io import limits
from ddim.errors import DdimError

if TYPE_CHECKING:
    from torch import Tensor


class Scales(Protocol):
    """The factors of x_0 and eps in x_t: the two numbers of a `Level`, or tensors with one number per sample."""

    @property
    def signal(self) -> float | Tensor:
        """sqrt(alpha_bar)."""

    @property
    def noise(self) -> float | Tensor:
        """sqrt(1 - alpha_bar)."""


@dataclass(frozen=True, slots=True)
class Level:
    """A timestep of a schedule and its log-SNR.

    Args:
        t: Timestep, 0 (clean) to T; the network of a DDPM receives t - 1, see `ddim.nn`.
        log_snr: log(alpha_bar / (1 - alpha_bar)); +inf for clean data, -inf for pure noise.
    """

    t: float
    log_snr: float

    @property
    def alpha_bar(self) -> float:
        """Signal power, in [0, 1]."""
        return _sigmoid(self.log_snr)

    @property
    def variance(self) -> float:
        """Noise power 1 - alpha_bar, computed without cancellation near clean data."""
        return _sigmoid(-self.log_snr)

    @property
    def signal(self) -> float:
        """sqrt(alpha_bar)."""
        return math.sqrt(self.alpha_bar)

    @property
    def noise(self) -> float:
        """sqrt(1 - alpha_bar)."""
        return math.sqrt(self.variance)

    @property
    def ratio(self) -> float:
        """noise / signal, the v of eq. (14); inf at zero signal."""
        return math.inf if self.log_snr < -1400 else math.exp(-self.log_snr / 2)

    @property
    def angle(self) -> float:
        """arccos(signal) = arctan(noise / signal), in [0, pi/2]."""
        return math.atan(self.ratio)

    @property
    def log_alpha_bar(self) -> float:
        """log(alpha_bar), -inf at zero signal."""
        return -_softplus(-self.log_snr)


@dataclass(frozen=True)
class Schedule:
    """A noise schedule: the log-SNR at t = 1..T; t = 0 is exactly clean data.

    Args:
        log_snr: float64, (T,), strictly falling; the last entry may be -inf (zero terminal SNR).
        name: The schedule's name in configurations and messages.

    Raises:
        DdimError: If the table is empty, not finite before T, or does not fall.
    """

    log_snr: np.ndarray
    name: str = "custom"
    _angles: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = np.array(self.log_snr, dtype=np.float64)
        if table.ndim != 1 or not len(table):
            raise DdimError(f"schedule {self.name}", "has no timesteps", "pass at least one")
        if np.isnan(table).any() or not np.isfinite(table[:-1]).all() or table[-1] == math.inf:
            raise DdimError(f"schedule {self.name}", "has a log-SNR that is not finite before T", "check its betas")
        if (np.diff(table) >= 0).any():
            at = int(np.argmax(np.diff(table) >= 0)) + 2
            raise DdimError(
                f"schedule {self.name}", f"has a log-SNR that does not fall at t = {at}", "every beta must be > 0"
            )
        table.setflags(write=False)
        object.__setattr__(self, "log_snr", table)
        angles = np.array([0.0, *(Level(0.0, float(value)).angle for value in table)])
        object.__setattr__(self, "_angles", angles)

    def __repr__(self) -> str:
        return f"Schedule({self.name!r}, T={self.T}, log-SNR {self.log_snr[0]:.4g} to {self.log_snr[-1]:.4g})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.log_snr, self.name)  # the constructor makes the table read-only again

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and np.array_equal(self.log_snr, other.log_snr)

    def __hash__(self) -> int:
        return hash(self.log_snr.tobytes())

    @property
    def T(self) -> int:
        """The number of timesteps t = 1..T."""
        return len(self.log_snr)

    def level(self, t: float) -> Level:
        """The level at a timestep; between two entries the angle is interpolated linearly.

        The angle is the only coordinate that is finite at both ends, t = 0 and zero terminal SNR.

        Args:
            t: 0 <= t <= T, whole or not.

        Raises:
            DdimError: If t is out of range or not a number.
        """
        if not 0 <= t <= self.T:
            raise DdimError(f"time {t}", f"is outside 0..{self.T}", "choose a timestep in that range")
        below = math.floor(t)
        if t == below:
            return Level(float(t), math.inf if below == 0 else float(self.log_snr[below - 1]))
        weight = t - below
        angle = (1 - weight) * self._angles[below] + weight * self._angles[below + 1]
        return Level(float(t), -2.0 * math.log(math.tan(angle)) if angle > 0 else math.inf)

    def levels(self, times: Sequence[float]) -> tuple[Level, ...]:
        """The levels at several timesteps, in the given order."""
        return tuple(self.level(t) for t in times)

    def time_at_angle(self, angle: float) -> float:
        """The real-valued t in [0, T] with this angle; the inverse of `level(t).angle`."""
        return float(np.interp(angle, self._angles, np.arange(self.T + 1)))

    def time_at_log_snr(self, log_snr: float) -> float:
        """The real-valued t in [0, T] with this log-SNR."""
        return self.time_at_angle(Level(0.0, log_snr).angle)

    @property
    def alpha_bar(self) -> np.ndarray:
        """float64, (T + 1,): alpha_bar at t = 0..T; entry 0 is 1."""
        return np.array([1.0, *(_sigmoid(float(value)) for value in self.log_snr)])

    @property
    def betas(self) -> np.ndarray:
        """float64, (T,): beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, the argument of `from_betas`."""
        alpha_bar = self.alpha_bar
        return np.asarray(1 - alpha_bar[1:] / alpha_bar[:-1])


def from_betas(betas: Sequence[float] | np.ndarray, name: str = "betas") -> Schedule:
    """A schedule from the variances beta_1..beta_T: alpha_bar_t = prod_{s <= t} (1 - beta_s) (Ho et al. 2020).

    Args:
        betas: (T,), each 0 < beta < 1; the last may be 1 (zero terminal SNR).
        name: The name of the schedule.

    Raises:
        DdimError: If a beta is out of range.
    """
    try:
        beta = np.asarray(betas, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DdimError(f"schedule {name}", "has betas that are not numbers", "pass a list of T numbers") from None
    if beta.ndim != 1:
        raise DdimError(f"schedule {name}", f"has betas of shape {beta.shape}", "pass a list of T numbers")
    if beta.size > limits.TIMES:
        raise DdimError(f"schedule {name}", f"has more than {limits.TIMES:,} timesteps", "pass fewer betas")
    valid = (beta > 0) & (beta < 1)
    if beta.size:
        valid[-1] |= beta[-1] == 1
    if not valid.all():
        at = int(np.argmin(valid))
        raise DdimError(f"schedule {name}", f"has beta_{at + 1} = {beta[at]} outside (0, 1)", "fix the betas")
    with np.errstate(divide="ignore"):
        log_alpha_bar = np.cumsum(np.log1p(-beta))
    return Schedule(_log_snr_from_log_alpha_bar(log_alpha_bar), name)


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas that rise linearly: the schedule of Ho et al. 2020 and of the DDIM paper."""
    return from_betas(np.linspace(beta_start, beta_end, _length(T)), "linear")


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """Betas whose square root rises linearly: the schedule of latent diffusion (Rombach et al. 2022)."""
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, _length(T)) ** 2, "scaled-linear")


def quadratic(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas that rise quadratically, beta_t = a + (b - a) ((t - 1) / (T - 1))^2."""
    ramp = np.linspace(0.0, 1.0, _length(T))
    return from_betas(beta_start + (beta_end - beta_start) * ramp**2, "quadratic")


def sigmoid(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas along a logistic curve from -6 to 6 (the `sigmoid` of the DDPM and GeoDiff code)."""
    ramp = np.linspace(-6.0, 6.0, _length(T))
    return from_betas(beta_start + (beta_end - beta_start) / (1 + np.exp(-ramp)), "sigmoid")


def cosine(T: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> Schedule:
    """alpha_bar along a squared cosine with betas capped (Nichol & Dhariwal 2021, eq. 17)."""
    u = np.arange(_length(T) + 1) / T
    curve = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - curve[1:] / curve[:-1], beta_max), "cosine")


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with sqrt(alpha_bar) shifted and scaled so that alpha_bar_T = 0 (Lin et al. 2023, algorithm 1).

    The signal at t = 1 is unchanged. A predicted eps does not determine x_0 at T: use a network that predicts v or x0.
    """
    signal = np.sqrt(schedule.alpha_bar[1:])
    first, last = signal[0], signal[-1]
    if schedule.T < 2:
        raise DdimError(f"schedule {schedule.name}", "has only one timestep", "use two or more")
    rescaled = (signal - last) * first / (first - last)
    with np.errstate(divide="ignore"):
        log_snr = _log_snr_from_log_alpha_bar(2 * np.log(rescaled))
    return Schedule(log_snr, f"{schedule.name}+zero-terminal-snr")


NAMED = {
    "linear": linear,
    "scaled-linear": scaled_linear,
    "quadratic": quadratic,
    "sigmoid": sigmoid,
    "cosine": cosine,
}


def _length(T: int) -> int:
    if T < 1:
        raise DdimError(f"schedule of T = {T}", "has no timesteps", "use T >= 1")
    if T > limits.TIMES:
        raise DdimError(f"schedule of T = {T}", f"has more than {limits.TIMES:,} timesteps", "use a smaller T")
    return T


def _log_snr_from_log_alpha_bar(log_alpha_bar: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.asarray(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))


@functools.lru_cache(maxsize=4096)  # a run evaluates the same few levels at every step
def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    e = math.exp(x)
    return e / (1.0 + e)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

"""Write docs/equations.md: the function that implements each equation, and its tests.

    python scripts/equations.py            write docs/equations.md; `make docs` does this
    python scripts/equations.py --print    print it instead

A function whose docstring begins with "Eq. (n)", "Section n" or "Theorem n" is the home of that statement; a test whose
docstring begins in this way is one of its tests. Only the statements themselves are written here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "equations.md"

STATEMENTS = {
    "Eq. (3)": "q(x_t given x_s) = N(sqrt(abar_t / abar_s) x_s, (1 - abar_t / abar_s) I), the Markov chain of DDPM",
    "Eq. (4)": "q(x_t given x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)",
    "Eq. (5)": "L_gamma = sum_t gamma_t E &#124;&#124;eps - eps_theta(sqrt(abar_t) x_0 + "
    "sqrt(1 - abar_t) eps, t)&#124;&#124;^2",
    "Eq. (6)": "q_sigma(x_{1:T} given x_0) = q_sigma(x_T given x_0) prod_{t=2..T} q_sigma(x_{t-1} given x_t, x_0)",
    "Eq. (7)": "q_sigma(x_s given x_t, x_0) = N(sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) "
    "(x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t), sigma^2 I), 0 <= sigma^2 <= 1 - abar_s",
    "Eq. (8)": "q_sigma(x_t given x_s, x_0) = q_sigma(x_s given x_t, x_0) q_sigma(x_t given x_0) / "
    "q_sigma(x_s given x_0), a Gaussian",
    "Eq. (9)": "f_theta(x_t) = (x_t - sqrt(1 - abar_t) eps_theta(x_t)) / sqrt(abar_t)",
    "Eq. (10)": "p_theta(x_s given x_t) = q_sigma(x_s given x_t, f_theta(x_t)); at the last step "
    "N(f_theta(x_1), sigma_1^2 I)",
    "Eq. (11)": "J_sigma = E_q[log q_sigma(x_{1:T} given x_0) - log p_theta(x_{0:T})]",
    "Theorem 1": "J_sigma = L_gamma + C with gamma_t = (sqrt(abar_s) - sqrt(1 - abar_s - sigma^2) sqrt(abar_t) / "
    "sqrt(1 - abar_t))^2 (1 - abar_t) / abar_t / (2 sigma^2)",
    "Eq. (12)": "x_s = sqrt(abar_s) f_theta(x_t) + sqrt(1 - abar_s - sigma^2) eps_theta(x_t) + sigma z",
    "Eq. (13)": "xbar_s = xbar_t + (v_s - v_t) eps_theta with xbar = x / sqrt(abar), v = sqrt((1 - abar) / abar): "
    "(12) at sigma = 0; over rising levels it encodes",
    "Eq. (14)": "d xbar = eps_theta(xbar / sqrt(v^2 + 1)) dv: the ODE of which (13) is an Euler step",
    "Proposition 1": "it is the probability flow of the SDE d xbar = sqrt(d v^2 / dt) dw: "
    "d xbar = -1/2 grad log p_t(xbar) d v^2",
    "Eq. (15)": "xbar_s = xbar_t + 1/2 (v_s^2 - v_t^2) / v_t eps_theta: Euler on the probability flow in dt",
    "Eq. (16)": "sigma(eta) = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)",
    "Section 4.2": "tau is a rising sub-sequence of 1..T: floor(c i) (linear) or floor(c i^2) (quadratic); "
    "a sampler visits tau_S, ..., tau_1, then 0",
    "Section 5": "sigma-hat = sqrt(1 - abar_t / abar_s): noise of this size on the mean of eta = 1, "
    "none at the last step",
    "Eq. (17)": "q(x_t given x_0) = Cat(abar_t x_0 + (1 - abar_t) pi), pi = 1_K uniform in the paper",
    "Eq. (18)": "x_s is x_t with weight sigma, x_0 with abar_s - sigma abar_t, redrawn from pi with "
    "(1 - abar_s) - (1 - abar_t) sigma; 0 <= sigma <= (1 - abar_s) / (1 - abar_t)",
    "Eq. (19)": "q_sigma(x_s given x_t, x_0) = Cat of these three",
    "Eq. (20)": "p_theta(x_s given x_t): (19) with the predicted f_theta(x_t) for x_0",
    "Eq. (21)": "KL(q_sigma(x_s given x_t, x_0) &#124;&#124; p_theta(x_s given x_t)), the categorical objective",
    "Eq. (22)": "Lemma 1: q_sigma(x_t given x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) for every t",
    "Eq. (23)": "q_sigma(x_s given x_0) = integral of q_sigma(x_t given x_0) q_sigma(x_s given x_t, x_0) over x_t",
    "Eq. (24)": "its mean: sqrt(abar_s) x_0",
    "Eq. (25)": "its covariance: sigma^2 I + (1 - abar_s - sigma^2) / (1 - abar_t) (1 - abar_t) I = (1 - abar_s) I",
    "Eq. (29)": "J_sigma = KL(q(x_T given x_0) &#124;&#124; p(x_T)) + sum_t KL(q_sigma &#124;&#124; p_theta) - "
    "log p_theta(x_0 given x_1)",
    "Eq. (30)": "KL(q_sigma(x_s given x_t, x_0) &#124;&#124; q_sigma(x_s given x_t, f_theta(x_t)))",
    "Eq. (31)": "= c^2 &#124;&#124;x_0 - f_theta&#124;&#124;^2 / (2 sigma^2)",
    "Eq. (32)": "= gamma_t &#124;&#124;eps - eps_theta&#124;&#124;^2",
    "Eq. (33)": "-log p_theta(x_0 given x_1) = &#124;&#124;x_0 - f_theta(x_1)&#124;&#124;^2 / (2 sigma_1^2) + const",
    "Eq. (34)": "= (1 - abar_1) / (2 sigma_1^2 abar_1) &#124;&#124;eps - eps_theta(x_1)&#124;&#124;^2 + const",
    "Eq. (52)": "q_{sigma,tau}(x_{1:T} given x_0) = q(x_{tau_S} given x_0) "
    "prod_i q(x_{tau_{i-1}} given x_{tau_i}, x_0) prod_{t outside tau} q(x_t given x_0)",
    "Eq. (53)": "its factors: (4) at tau_S and outside tau, (7) between neighbours in tau",
    "Eq. (54)": "p_theta(x_{0:T}) = p(x_T) prod_i p_theta(x_{tau_{i-1}} given x_{tau_i}) "
    "prod_{t outside tau} p_theta(x_0 given x_t)",
    "Eq. (55)": "p_theta(x_{tau_{i-1}} given x_{tau_i}) = q(x_{tau_{i-1}} given x_{tau_i}, f_theta(x_{tau_i}))",
    "Eq. (56)": "p_theta(x_0 given x_t) = N(f_theta(x_t), sigma_t^2 I) otherwise",
    "Eq. (57)": "J = E_q[log q_{sigma,tau} - log p_theta]",
    "Eq. (58)": "= the divergences over tau and, for t outside, -log p_theta(x_0 given x_t), + const",
    "Eq. (67)": "slerp(z_0, z_1; a) = sin((1 - a) theta) / sin(theta) z_0 + sin(a theta) / sin(theta) z_1, "
    "theta the angle between z_0 and z_1",
}

# The numbered equations of the method, and of its appendices those that are statements; each must have a home.
REQUIRED = [f"Eq. ({n})" for n in (*range(3, 26), *range(29, 35), *range(52, 59), 67)]

MISPRINTS = (  # where, as printed in some notes and posts, correct
    (
        "sigma_t of DDPM, eq. (16) at eta = 1",
        "sqrt((1-abar_{t-1})/(1-abar_t)) sqrt((1-abar_t)/abar_{t-1})",
        "the second factor is sqrt(1 - abar_t/abar_{t-1})",
    ),
    (
        "eta, eq. (16)",
        "sigma^2 = eta (1-abar_{t-1}) beta_t/(1-abar_t)",
        "sigma^2 = eta^2 (1-abar_{t-1}) beta_t/(1-abar_t): eta multiplies the standard deviation",
    ),
    (
        "kappa, the weight of x_t, eq. (7)",
        "kappa = sqrt(((1-abar_{t-1})^2 - sigma^2)/(1-abar_t))",
        "kappa = sqrt((1-abar_{t-1} - sigma^2)/(1-abar_t)), from 1-abar_{t-1} = kappa^2 (1-abar_t) + sigma^2",
    ),
    ("Lemma 1, covariance of q_sigma(x_t given x_0)", "sqrt(1-abar_t) I", "(1-abar_t) I"),
    (
        "Theorem 1, weight of the squared error in eps",
        "1/(2 sigma^2 abar_t), up to a factor that is not given",
        "(sqrt(abar_s) - sqrt(1-abar_s-sigma^2) sqrt(abar_t)/sqrt(1-abar_t))^2 (1-abar_t)/abar_t / "
        "(2 sigma^2), since x_0 enters the mean of (7) twice; (1-abar_1)/(2 sigma_1^2 abar_1) at the last "
        "step. The theorem, that some positive gamma exists, is unaffected",
    ),
)

PAGE_HEAD = """\
# Equations

`make docs` generates this page from the docstrings; a test fails if it is out of date.

The numbers are those of Song, Meng and Ermon, "Denoising Diffusion Implicit Models" (ICLR 2021); those of the
appendices follow the fourth version on arXiv, to the best of our knowledge. `abar_t` is the paper's alpha_t (bar
alpha_t in the DDPM paper), t the current timestep and s the next one, which is cleaner when sampling; at t = 0 the data
are clean and abar_0 = 1. `v` is sqrt((1 - abar) / abar), `xbar` is x / sqrt(abar), and `pi` the stationary distribution
of tokens.

Each equation is implemented in one place: the function whose docstring begins with its number. A test whose docstring
begins with the number is one of its tests.
"""


class Place(NamedTuple):
    """A function or class that names a statement."""

    label: str  # "Eq. (4)"
    file: str  # "src/ddim/process/gaussian.py"
    name: str  # "diffuse" or "Class.method"


LABEL = re.compile(
    r"(?:Eqs?\. )(\((\d+)\)(?:(?:, | and |, and )\((\d+)\))*)|"
    r"(Section \d(?:\.\d)?|Appendix [A-D]|Theorem \d|Proposition \d)\b"
)


def labels(docstring: str) -> list[str]:
    """The statements a docstring begins with: "Eqs. (4) and (7)" gives two."""
    match = LABEL.match(docstring)
    if not match:
        return []
    return [f"Eq. ({n})" for n in re.findall(r"\((\d+)\)", match[1])] if match[1] else [match[4]]


def places(folder: Path) -> Iterator[Place]:
    """Every function and class below a folder whose docstring begins with a statement's label."""
    for path in sorted(folder.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        yield from _inside(ast.parse(path.read_text(encoding="utf-8")), file, "")


def _inside(node: ast.AST, file: str, prefix: str) -> Iterator[Place]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = prefix + child.name
            yield from (Place(label, file, name) for label in labels(ast.get_docstring(child) or ""))
            yield from _inside(child, file, f"{name}.")


def homes() -> dict[str, list[Place]]:
    """The homes in src/ddim of each statement, in the order of the page; there should be one each."""
    return _by_label(places(ROOT / "src" / "ddim"))


def tests() -> dict[str, list[Place]]:
    """The tests of each statement."""
    return _by_label(
        place for place in places(ROOT / "tests") if place.name.rpartition(".")[2].startswith(("test", "Test"))
    )


def _by_label(places: Iterator[Place]) -> dict[str, list[Place]]:
    grouped: dict[str, list[Place]] = {}
    for place in places:
        grouped.setdefault(place.label, []).append(place)
    order = [*STATEMENTS]
    return dict(sorted(grouped.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def page() -> str:
    """The text of docs/equations.md."""
    tested = tests()
    lines = [PAGE_HEAD, "| equation | statement | function | tests |", "|-|-|-|-|"]
    for label, at in homes().items():
        home = ", ".join(f"`{_dotted(place)}`" for place in at)
        lines.append(f"| {label} | {STATEMENTS.get(label, '?')} | {home} | {_tests_of(tested, label)} |")
    lines += ["", "## Common misprints", "", "The correct forms are in the last column.", ""]
    lines += ["| where | printed in some notes and posts | correct |", "|-|-|-|"]
    lines += [f"| {where} | {printed} | {right} |" for where, printed, right in MISPRINTS]
    return "\n".join(lines) + "\n"


def _tests_of(tested: dict[str, list[Place]], label: str) -> str:
    return "<br>".join(f"`{place.file}::{place.name}`" for place in tested.get(label, [])) or "none"


def _dotted(place: Place) -> str:
    module = place.file.removeprefix("src/").removesuffix(".py").replace("/", ".")
    return f"{module}.{place.name}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(page(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")

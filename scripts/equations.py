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


class Statement(NamedTuple):
    """What an equation states."""

    title: str  # "the forward marginal"
    latex: str  # set in the mathematics mode of LaTeX
    note: str = ""  # a sentence in Markdown


class Misprint(NamedTuple):
    """A formula that notes and posts print in a wrong form."""

    where: str
    printed: str  # LaTeX
    correct: str  # LaTeX
    note: str = ""


# The title of a section of the page, by the statement that it starts with.
SECTIONS = {
    "Eq. (3)": "The forward process and the objective",
    "Eq. (6)": "The non-Markovian family",
    "Eq. (12)": "Sampling",
    "Eq. (17)": "Appendix A: discrete data",
    "Eq. (22)": "Appendix B: proofs",
    "Eq. (52)": "Appendix C: sub-sequences",
    "Eq. (67)": "Appendix D: interpolation",
}

STATEMENTS = {
    "Eq. (3)": Statement(
        "the Markov chain of DDPM",
        r"q(x_t \mid x_s) = \mathcal{N}\left(\sqrt{\bar\alpha_t / \bar\alpha_s}\, x_s,\ "
        r"(1 - \bar\alpha_t / \bar\alpha_s) I\right)",
    ),
    "Eq. (4)": Statement(
        "the forward marginal",
        r"q(x_t \mid x_0) = \mathcal{N}\left(\sqrt{\bar\alpha_t}\, x_0,\ (1 - \bar\alpha_t) I\right)",
    ),
    "Eq. (5)": Statement(
        "the objective",
        r"L_\gamma = \sum_{t=1}^{T} \gamma_t\, \mathbb{E} \left\Vert \epsilon - \epsilon_\theta\left("
        r"\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon,\ t\right) \right\Vert^2",
    ),
    "Eq. (6)": Statement(
        "the joint distribution",
        r"q_\sigma(x_{1:T} \mid x_0) = q_\sigma(x_T \mid x_0) \prod_{t=2}^{T} q_\sigma(x_{t-1} \mid x_t, x_0)",
    ),
    "Eq. (7)": Statement(
        "the reverse conditional",
        r"q_\sigma(x_s \mid x_t, x_0) = \mathcal{N}\left(\sqrt{\bar\alpha_s}\, x_0 + "
        r"\sqrt{1 - \bar\alpha_s - \sigma^2}\ \frac{x_t - \sqrt{\bar\alpha_t}\, x_0}{\sqrt{1 - \bar\alpha_t}},\ "
        r"\sigma^2 I\right), \quad 0 \leq \sigma^2 \leq 1 - \bar\alpha_s",
    ),
    "Eq. (8)": Statement(
        "the forward conditional",
        r"q_\sigma(x_t \mid x_s, x_0) = \frac{q_\sigma(x_s \mid x_t, x_0)\ q_\sigma(x_t \mid x_0)}"
        r"{q_\sigma(x_s \mid x_0)}",
        "It is Gaussian.",
    ),
    "Eq. (9)": Statement(
        "the predicted clean data",
        r"f_\theta(x_t) = \frac{x_t - \sqrt{1 - \bar\alpha_t}\ \epsilon_\theta(x_t)}{\sqrt{\bar\alpha_t}}",
    ),
    "Eq. (10)": Statement(
        "the generative process",
        r"p_\theta(x_s \mid x_t) = q_\sigma(x_s \mid x_t, f_\theta(x_t)), \qquad "
        r"p_\theta(x_0 \mid x_1) = \mathcal{N}(f_\theta(x_1),\ \sigma_1^2 I)",
    ),
    "Eq. (11)": Statement(
        "the variational objective",
        r"J_\sigma = \mathbb{E}_{q_\sigma}\left[\log q_\sigma(x_{1:T} \mid x_0) - \log p_\theta(x_{0:T})\right]",
    ),
    "Theorem 1": Statement(
        "the two objectives agree",
        r"J_\sigma = L_\gamma + C, \qquad \gamma_t = \left(\sqrt{\bar\alpha_s} - \frac{"
        r"\sqrt{1 - \bar\alpha_s - \sigma^2}\ \sqrt{\bar\alpha_t}}{\sqrt{1 - \bar\alpha_t}}\right)^2 "
        r"\frac{1 - \bar\alpha_t}{2 \sigma^2\, \bar\alpha_t}",
    ),
    "Eq. (12)": Statement(
        "the sampling step",
        r"x_s = \sqrt{\bar\alpha_s}\ f_\theta(x_t) + \sqrt{1 - \bar\alpha_s - \sigma^2}\ \epsilon_\theta(x_t) "
        r"+ \sigma z",
    ),
    "Eq. (13)": Statement(
        "the DDIM step",
        r"\bar x_s = \bar x_t + (v_s - v_t)\, \epsilon_\theta(x_t)",
        "Equation (12) without noise; over rising levels it encodes.",
    ),
    "Eq. (14)": Statement(
        "the ODE",
        r"\mathrm{d} \bar x = \epsilon_\theta\left(\frac{\bar x}{\sqrt{v^2 + 1}}\right) \mathrm{d} v",
        "Equation (13) is an Euler step of it.",
    ),
    "Proposition 1": Statement(
        "the probability flow",
        r"\mathrm{d} \bar x = - \frac{1}{2}\, \nabla \log p_t(\bar x)\ \mathrm{d} v^2",
        r"The ODE (14) is the probability flow of the SDE "
        r"$\mathrm{d} \bar x = \sqrt{\mathrm{d} v^2 / \mathrm{d} t}\ \mathrm{d} w$.",
    ),
    "Eq. (15)": Statement(
        "Euler's method in t",
        r"\bar x_s = \bar x_t + \frac{1}{2}\, \frac{v_s^2 - v_t^2}{v_t}\ \epsilon_\theta(x_t)",
        "An Euler step on the probability flow in dt.",
    ),
    "Eq. (16)": Statement(
        "the noise of a step",
        r"\sigma(\eta) = \eta\, \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}}\ "
        r"\sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_s}}",
    ),
    "Section 4.2": Statement(
        "the timesteps",
        r"\tau_i = \lfloor c\, i \rfloor \ \mathrm{(linear)} \quad \mathrm{or} \quad "
        r"\tau_i = \lfloor c\, i^2 \rfloor \ \mathrm{(quadratic)}",
        r"$\tau$ is a rising sub-sequence of 1..T; a sampler visits $\tau_S, \ldots, \tau_1$, then 0.",
    ),
    "Section 5": Statement(
        "the larger noise",
        r"\hat\sigma = \sqrt{1 - \bar\alpha_t / \bar\alpha_s}",
        r"Noise of this size is added to the mean of $\eta = 1$, and none at the last step.",
    ),
    "Eq. (17)": Statement(
        "the forward marginal",
        r"q(x_t \mid x_0) = \mathrm{Cat}\left(\bar\alpha_t\, x_0 + (1 - \bar\alpha_t)\, \pi\right)",
        r"In the paper $\pi = 1_K$ is uniform.",
    ),
    "Eq. (18)": Statement(
        "the weights of a step",
        r"\sigma \ \mathrm{of}\ x_t, \quad \bar\alpha_s - \sigma \bar\alpha_t \ \mathrm{of}\ x_0, \quad "
        r"(1 - \bar\alpha_s) - (1 - \bar\alpha_t)\, \sigma \ \mathrm{of}\ \pi, \qquad "
        r"0 \leq \sigma \leq \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}",
    ),
    "Eq. (19)": Statement(
        "the reverse conditional",
        r"q_\sigma(x_s \mid x_t, x_0) = \mathrm{Cat}\left(\sigma x_t + (\bar\alpha_s - \sigma \bar\alpha_t)\, x_0 + "
        r"((1 - \bar\alpha_s) - (1 - \bar\alpha_t)\, \sigma)\, \pi\right)",
    ),
    "Eq. (20)": Statement(
        "the generative process",
        r"p_\theta(x_s \mid x_t) = q_\sigma(x_s \mid x_t, f_\theta(x_t))",
    ),
    "Eq. (21)": Statement(
        "the objective",
        r"\mathrm{KL}\left(q_\sigma(x_s \mid x_t, x_0)\ \Vert\ p_\theta(x_s \mid x_t)\right)",
    ),
    "Eq. (22)": Statement(
        "Lemma 1",
        r"q_\sigma(x_t \mid x_0) = \mathcal{N}\left(\sqrt{\bar\alpha_t}\, x_0,\ (1 - \bar\alpha_t) I\right) "
        r"\quad \mathrm{for\ every}\ t",
    ),
    "Eq. (23)": Statement(
        "the step of the induction",
        r"q_\sigma(x_s \mid x_0) = \int q_\sigma(x_t \mid x_0)\ q_\sigma(x_s \mid x_t, x_0)\ \mathrm{d} x_t",
    ),
    "Eq. (24)": Statement("its mean", r"\mu_s = \sqrt{\bar\alpha_s}\, x_0"),
    "Eq. (25)": Statement(
        "its covariance",
        r"\Sigma_s = \sigma^2 I + \frac{1 - \bar\alpha_s - \sigma^2}{1 - \bar\alpha_t}\, (1 - \bar\alpha_t) I = "
        r"(1 - \bar\alpha_s) I",
    ),
    "Eq. (29)": Statement(
        "the objective as divergences",
        r"J_\sigma = \mathbb{E}\left[\mathrm{KL}\left(q_\sigma(x_T \mid x_0)\ \Vert\ p(x_T)\right) + \sum_{t=2}^{T} "
        r"\mathrm{KL}\left(q_\sigma(x_{t-1} \mid x_t, x_0)\ \Vert\ p_\theta(x_{t-1} \mid x_t)\right) - "
        r"\log p_\theta(x_0 \mid x_1)\right]",
    ),
    "Eq. (30)": Statement(
        "a divergence",
        r"\mathrm{KL}_t = \mathrm{KL}\left(q_\sigma(x_s \mid x_t, x_0)\ \Vert\ "
        r"q_\sigma(x_s \mid x_t, f_\theta(x_t))\right)",
    ),
    "Eq. (31)": Statement(
        "as an error in the clean data",
        r"\mathrm{KL}_t = c^2\, \frac{\Vert x_0 - f_\theta(x_t) \Vert^2}{2 \sigma^2}, \qquad c = \sqrt{\bar\alpha_s} - "
        r"\frac{\sqrt{1 - \bar\alpha_s - \sigma^2}\ \sqrt{\bar\alpha_t}}{\sqrt{1 - \bar\alpha_t}}",
    ),
    "Eq. (32)": Statement(
        "as an error in the noise", r"\mathrm{KL}_t = \gamma_t\, \Vert \epsilon - \epsilon_\theta(x_t) \Vert^2"
    ),
    "Eq. (33)": Statement(
        "the last step",
        r"- \log p_\theta(x_0 \mid x_1) = \frac{\Vert x_0 - f_\theta(x_1) \Vert^2}{2 \sigma_1^2} + \mathrm{const}",
    ),
    "Eq. (34)": Statement(
        "the last step, as an error in the noise",
        r"- \log p_\theta(x_0 \mid x_1) = \frac{1 - \bar\alpha_1}{2 \sigma_1^2\, \bar\alpha_1}\, "
        r"\Vert \epsilon - \epsilon_\theta(x_1) \Vert^2 + \mathrm{const}",
    ),
    "Eq. (52)": Statement(
        "the joint distribution",
        r"q_{\sigma,\tau}(x_{1:T} \mid x_0) = q_{\sigma,\tau}(x_{\tau_S} \mid x_0) \prod_{i=2}^{S} "
        r"q_{\sigma,\tau}(x_{\tau_{i-1}} \mid x_{\tau_i}, x_0) \prod_{t \notin \tau} q_{\sigma,\tau}(x_t \mid x_0)",
    ),
    "Eq. (53)": Statement(
        "its factors",
        r"q_{\sigma,\tau}(x_t \mid x_0) = q(x_t \mid x_0) \ \mathrm{for}\ t = \tau_S \ \mathrm{and}\ t \notin \tau, "
        r"\qquad q_{\sigma,\tau}(x_{\tau_{i-1}} \mid x_{\tau_i}, x_0) = "
        r"q_\sigma(x_{\tau_{i-1}} \mid x_{\tau_i}, x_0)",
        "Equation (4) for the first, equation (7) for the second.",
    ),
    "Eq. (54)": Statement(
        "the generative process",
        r"p_\theta(x_{0:T}) = p(x_T) \prod_{i=1}^{S} p_\theta(x_{\tau_{i-1}} \mid x_{\tau_i}) "
        r"\prod_{t \notin \tau} p_\theta(x_0 \mid x_t)",
    ),
    "Eq. (55)": Statement(
        "its factors in the sub-sequence",
        r"p_\theta(x_{\tau_{i-1}} \mid x_{\tau_i}) = "
        r"q_{\sigma,\tau}(x_{\tau_{i-1}} \mid x_{\tau_i}, f_\theta(x_{\tau_i}))",
    ),
    "Eq. (56)": Statement("its other factors", r"p_\theta(x_0 \mid x_t) = \mathcal{N}(f_\theta(x_t),\ \sigma_t^2 I)"),
    "Eq. (57)": Statement(
        "the objective",
        r"J = \mathbb{E}\left[\log q_{\sigma,\tau}(x_{1:T} \mid x_0) - \log p_\theta(x_{0:T})\right]",
    ),
    "Eq. (58)": Statement(
        "the objective as divergences",
        r"J = \mathbb{E}\left[\sum_{i=2}^{S} \mathrm{KL}\left(q_{\sigma,\tau}(x_{\tau_{i-1}} \mid x_{\tau_i}, x_0)\ "
        r"\Vert\ p_\theta(x_{\tau_{i-1}} \mid x_{\tau_i})\right) - \log p_\theta(x_0 \mid x_{\tau_1}) - "
        r"\sum_{t \notin \tau} \log p_\theta(x_0 \mid x_t)\right] + \mathrm{const}",
    ),
    "Eq. (67)": Statement(
        "spherical interpolation",
        r"\mathrm{slerp}(z_0, z_1; a) = \frac{\sin((1 - a)\, \theta)}{\sin \theta}\, z_0 + "
        r"\frac{\sin(a\, \theta)}{\sin \theta}\, z_1",
        r"$\theta$ is the angle between the two latents.",
    ),
}

# The numbered equations of the method, and of its appendices those that are statements; each must have a home.
REQUIRED = [f"Eq. ({n})" for n in (*range(3, 26), *range(29, 35), *range(52, 59), 67)]

MISPRINTS = (
    Misprint(
        r"The noise of DDPM, eq. (16) at $\eta = 1$",
        r"\sigma_t = \sqrt{\frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t}}\ "
        r"\sqrt{\frac{1 - \bar\alpha_t}{\bar\alpha_{t-1}}}",
        r"\sigma_t = \sqrt{\frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t}}\ "
        r"\sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_{t-1}}}",
    ),
    Misprint(
        r"The scale $\eta$, eq. (16)",
        r"\sigma^2 = \eta\, \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t}\, \beta_t",
        r"\sigma^2 = \eta^2\, \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t}\, \beta_t",
        r"$\eta$ multiplies the standard deviation.",
    ),
    Misprint(
        r"The weight of $x_t$ in the mean, eq. (7)",
        r"\kappa = \sqrt{\frac{(1 - \bar\alpha_{t-1})^2 - \sigma^2}{1 - \bar\alpha_t}}",
        r"\kappa = \sqrt{\frac{1 - \bar\alpha_{t-1} - \sigma^2}{1 - \bar\alpha_t}}",
        r"It follows from $1 - \bar\alpha_{t-1} = \kappa^2 (1 - \bar\alpha_t) + \sigma^2$.",
    ),
    Misprint(
        "The covariance in Lemma 1, eq. (22)",
        r"\sqrt{1 - \bar\alpha_t}\ I",
        r"(1 - \bar\alpha_t)\, I",
    ),
    Misprint(
        "The weight of the squared error in the noise, Theorem 1",
        r"\frac{1}{2 d\, \sigma^2\, \bar\alpha_t}",
        r"\left(\sqrt{\bar\alpha_s} - \frac{\sqrt{1 - \bar\alpha_s - \sigma^2}\ \sqrt{\bar\alpha_t}}"
        r"{\sqrt{1 - \bar\alpha_t}}\right)^2 \frac{1 - \bar\alpha_t}{2 \sigma^2\, \bar\alpha_t}",
        "The clean data enter the mean of (7) twice; the last step is eq. (34). The printed form is meant up to a "
        "factor that is not stated, and the theorem, that some positive weight exists, is unaffected.",
    ),
)

PAGE_HEAD = r"""# Equations

`make docs` generates this page from the docstrings; a test fails if it is out of date.

The numbers are those of Song, Meng and Ermon, "Denoising Diffusion Implicit Models" (ICLR 2021); those of the
appendices follow the fourth version on arXiv, to the best of our knowledge.

- $\bar\alpha_t$ is the paper's $\alpha_t$ (and the $\bar\alpha_t$ of the DDPM paper).
- $t$ is the current timestep and $s$ the next one, which is cleaner when sampling; at $t = 0$ the data are clean.
- $\bar x = x / \sqrt{\bar\alpha}$, and $v = \sqrt{(1 - \bar\alpha) / \bar\alpha}$, the noise relative to the signal.
- $\pi$ is the stationary distribution of tokens.

Each equation is implemented in one place: the function whose docstring begins with its number. A test whose docstring
begins with the number is one of its tests. The [glossary](glossary.md) lists the names of the symbols in the code.
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
    lines = [PAGE_HEAD]
    for label, at in homes().items():
        statement = STATEMENTS.get(label, Statement("?", "?"))
        if label in SECTIONS:
            lines += [f"## {SECTIONS[label]}", ""]
        lines += [f"### {label}: {statement.title}", "", *_display(statement.latex)]
        lines += [statement.note, ""] if statement.note else []
        lines += _items("Function", [_dotted(place) for place in at])
        lines += [*_items("Tests", [f"{place.file}::{place.name}" for place in tested.get(label, [])]), ""]
    lines += ["## Common misprints", "", "Forms that are printed in some notes and posts, and the correct ones.", ""]
    for misprint in MISPRINTS:
        lines += [f"### {misprint.where}", "", "Printed:", "", *_display(misprint.printed)]
        lines += ["Correct:", "", *_display(misprint.correct)]
        lines += [misprint.note, ""] if misprint.note else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _display(latex: str) -> list[str]:
    """Displayed mathematics, for GitHub and the documentation site."""
    return ["```math", latex, "```", ""]


def _items(title: str, names: list[str]) -> list[str]:
    """One list item, with one line per name."""
    lines = [f"- {title}: `{names[0]}`" if len(names) == 1 else f"- {title}:"] if names else []
    return lines + [f"    - `{name}`" for name in names if len(names) > 1]


def _dotted(place: Place) -> str:
    module = place.file.removeprefix("src/").removesuffix(".py").replace("/", ".")
    return f"{module}.{place.name}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(page(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")

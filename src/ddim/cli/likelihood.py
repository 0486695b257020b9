"""`ddim likelihood`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._command import note
from ddim.cli._datasets import fit_option
from ddim.cli._options import OutputFolder, exact_device_options, grid_option, load_any, make_plan
from ddim.cli._progress import counted, last_step, run_with_progress
from ddim.cli._ranges import COUNT, POSITIVE, SEED, Whole
from ddim.errors import DdimError, warn

if TYPE_CHECKING:
    from ddim.evaluation.likelihood_run import Request
    from ddim.model.model import Model


@click.command("likelihood")
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("--out", required=True, type=OutputFolder(), help="Folder of the results; created or resumed.")
@click.option(
    "--method",
    type=click.Choice(["bound", "ode"]),
    default="bound",
    show_default=True,
    help="bound: the variational bound J_sigma, eq. (11). ode: the exact likelihood by the probability-flow ODE.",
)
@click.option(
    "--steps", type=COUNT, help="bound: network evaluations S [default: T]. ode: Runge-Kutta steps [default: 40]."
)
@grid_option(default="linear")
@click.option("--eta", type=POSITIVE, help="bound: sigma is eta times the posterior's; above 0. [default: 1]")
@click.option(
    "--sampler",
    help="bound, discrete data: markov, or ddim, which takes --eta. [default: ddim with --eta, else markov]",
)
@click.option("--draws", type=Whole(2), help="bound: number of the S rows drawn for each micro-batch. [default: all]")
@click.option("--sigma", help="bound: hat; one number per step (0 for the last); or optimal, also with --eta.")
@click.option("--last-sigma", type=POSITIVE, help="sigma_1 of the discretised last step. [default: as the step before]")
@click.option(
    "--dequantize",
    type=click.Choice(["decoder", "uniform"]),
    help="ode: decoder dequantises by the diffusion's noise and the discretised last step, uniform by uniform noise. "
    "[default: decoder]",
)
@click.option("--probes", type=COUNT, help="ode: probes of the Jacobian's trace per image. [default: 1]")
@click.option("--split", help="Split of a data set: train or test. [default: train]")
@click.option("--limit", type=COUNT, help="Maximum number of images or sequences.")
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Seed of all draws; those for image i depend on it and i."
)
@fit_option
@exact_device_options
def command(
    model: str,
    data: tuple[str, ...],
    out: Path,
    method: str,
    split: str | None,
    limit: int | None,
    seed: int,
    fit: str | None,
    device: str | None,
    dtype: str,
    compile_: bool,
    **settings: Any,
) -> dict[str, Any]:
    """Measure bits per dimension of 8-bit images DATA under MODEL: a bound for any sigma and S, or by the ODE.

    Models of discrete data have only the bound, in bits per character, token or pixel. By default it is the bound of
    the reverse Markov chain, averaged over the predicted x_0. With --sampler ddim and a fixed --eta above 0 the bound
    grows without limit as S grows: use that sampler only to generate samples.

    Results are written after every micro-batch. After an interruption, run the same command again to resume. A model
    with labels is measured without them.

    \b
    Examples:
      ddim likelihood mnist ./mnist --split test --limit 500 --out bound
      ddim likelihood mnist ./mnist --split test --limit 500 --method ode --out ode
      ddim likelihood mnist ./mnist --split test --limit 500 --steps 50 --sigma hat --out bound-50
      ddim likelihood tinyshakespeare ./shakespeare.txt --split test --draws 50 --out bound-text
    """
    from ddim.cli._inputs import read_items

    loaded = load_any(model, device, dtype, compile_)
    request = _request(loaded, method, seed, settings)
    images, names = read_items(data, loaded, split, limit, fit)

    from ddim.evaluation import likelihood_run

    total, unit, noun = len(images), loaded.kind.nll_unit, loaded.kind.noun
    initial: int | None = None

    def status(results: list[likelihood_run.Block], seconds: float) -> tuple[int, str]:
        nonlocal initial
        done = sum(len(block.bits) for block in results)
        initial = done if initial is None else initial
        mean = f"{likelihood_run.summary(results, request)['bits_per_dim']:.4f} {unit}  " if results else ""
        return done, f"{mean}{(done - initial) / seconds:.2f} {loaded.kind.unit}/s"

    def stopped(done: int) -> str:
        return f"{done} of {counted(total, noun)} in {out}; run the same command to resume"

    steps = last_step(likelihood_run.measure(loaded, images, names, request, out, Path(model).name))
    title = f"{counted(request.nfe, 'network evaluations')} each"
    results = run_with_progress(steps, title, total, status, stopped, transient=False)
    summary = likelihood_run.summary(results, request)
    _print_summary(summary, out, unit, noun)
    if method == "bound":
        _plot(summary, out / "terms.png")
    return {"out": out, **summary}


def _request(model: Model, method: str, seed: int, settings: dict[str, Any]) -> Request:
    if model.config.categorical is None:
        return (_bound if method == "bound" else _ode)(model, seed, settings)
    if method == "ode":
        raise DdimError("--method ode", "applies to real-valued data only", "leave it out")
    return _tokens(model, seed, settings)


def _refuse(settings: dict[str, Any], names: tuple[str, ...], method: str) -> None:
    for name in names:
        if settings[name] is not None:
            option = f"--{name.replace('_', '-')}"
            raise DdimError(f"{option} and --method {method}", "cannot be combined", f"leave {option} out")


def _bound(model: Model, seed: int, settings: dict[str, Any]) -> Request:
    from ddim.evaluation import likelihood_run

    _refuse(settings, ("probes", "dequantize"), "bound")
    if settings["sampler"] is not None:
        raise DdimError("--sampler", "applies to discrete data only", "use --eta and --sigma instead")
    eta, sigma = settings["eta"], settings["sigma"]
    plan = make_plan(
        model,
        settings["steps"],
        settings["grid"] or "linear",
        "ddim",
        {
            "eta": 1.0 if eta is None and sigma in (None, "optimal") else eta,
            "sigma": sigma,
            "clip_x0": None if sigma == "hat" else False,  # the bound is for the unclipped network
            "top": None if (settings["grid"] or "l")[0].isdigit() else model.schedule.T,  # and starts at T
        },
        model.schedule.T,
    )
    return likelihood_run.bound_request(model, plan, settings["last_sigma"], seed, _draws(settings))


def _tokens(model: Model, seed: int, settings: dict[str, Any]) -> Request:
    from ddim.evaluation import likelihood_run

    for name in ("last_sigma", "sigma", "probes", "dequantize"):
        if settings[name] is not None:
            option = f"--{name.replace('_', '-')}"
            raise DdimError(option, "applies to real-valued data only", "leave it out")
    eta, sampler = settings["eta"], settings["sampler"] or ("markov" if settings["eta"] is None else "ddim")
    steps = settings["steps"]
    if steps is None and not (settings["grid"] or "")[:1].isdigit():
        steps = model.schedule.T
    plan: Any = make_plan(model, steps, settings["grid"] or "linear", sampler, {"eta": eta})
    if eta:
        warn(f"eta {eta:g}: this bound grows without limit as S grows; compare models with --sampler markov")
    return likelihood_run.token_request(model, plan, seed, _draws(settings))


def _draws(settings: dict[str, Any]) -> int:
    """The value of --draws, or 0 for all rows if it is not passed."""
    return settings["draws"] or 0


def _ode(model: Model, seed: int, settings: dict[str, Any]) -> Request:
    from ddim.evaluation import likelihood_run

    _refuse(settings, ("grid", "eta", "sigma", "draws", "sampler"), "ode")
    options = {name: settings[name] for name in ("steps", "dequantize", "probes") if settings[name] is not None}
    if options.get("dequantize") == "uniform":
        _refuse(settings, ("last_sigma",), "ode --dequantize uniform")
    return likelihood_run.ode_request(model, last_sigma=settings["last_sigma"], seed=seed, **options)


def _print_summary(result: dict[str, Any], out: Path, unit: str, noun: str) -> None:
    spread = result["standard_error"]
    width = "" if spread is None else f" +- {spread:.4f} (standard error)"
    click.echo(f"{result['bits_per_dim']:.4f} {unit}{width}, {counted(result['pictures'], noun)}, {result['plan']}")
    sigma = result["last_sigma"]
    if result["dequantisation"]:
        click.echo(f"dequantisation: {result['dequantisation']}" + (f", sigma_1 = {sigma:.6g}" if sigma else ""))
    if result["method"] == "ode":
        error = f"mean {result['solver_error_mean']:.2e}, largest {result['solver_error_max']:.2e} bits/dim"
        if result["solver_error_mean"] > 0.1:
            warn("the solver's error is large", "use more --steps")
        click.echo(f"solver's error (half the steps): {error}; {counted(result['probes'], 'probes')} of the trace")
    else:
        inner = result["bits_per_dim"] - result["prior"] - result["last_step"]
        click.echo(f"prior {result['prior']:.6f}, steps {inner:.4f}, last step {result['last_step']:.4f} {unit}")
    click.echo(f"results: {out / 'likelihood.json'}, {out / 'values.csv'}")


def _plot(result: dict[str, Any], path: Path) -> None:
    """Plot the terms of the bound over t to a PNG file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        note("note: the terms are not plotted: matplotlib is not installed; pip install 'ddim[plot]'")
        return
    from ddim._io.atomic import write_atomic

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = result["steps"]
    axes.plot([s["from"] for s in steps], [s["bits_per_dim"] for s in steps], marker="." if len(steps) < 60 else "")
    axes.set(xscale="log", yscale="log", xlabel="t", ylabel="bits/dim of the step from t")
    axes.set_title(
        f"{result['bits_per_dim']:.3f} bits/dim, {result['plan']}, {counted(result['pictures'], 'images')}", fontsize=9
    )
    axes.grid(alpha=0.3)
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())
    click.echo(f"figure: {path}")

"""The reference of benchmarks.state_space: the JAX toolkit BayesNewton, run by a Python of its own that can import it.

    PYTHON benchmarks/_bayesnewton.py '{"name": "train", "n": 1000, "repeats": 5}'

prints one line of JSON. Nothing here imports torch or bayesgn; :func:`series` is the data of both sides.
"""

import json
import os
import statistics
import sys
import time

import numpy as np


def series(n, grid, likelihood="poisson", seed=0):
    """Times [n] (ten a lengthscale on average; ``regular`` or ``irregular``) and counts, labels or real targets [n]."""
    rng = np.random.RandomState(seed)
    t = np.arange(n) / 10.0 if grid == "regular" else np.cumsum(rng.exponential(0.1, n))
    f = np.sin(t / 3)
    y = {
        "poisson": lambda: rng.poisson(np.exp(f)),
        "bernoulli": lambda: rng.uniform(size=n) < 1 / (1 + np.exp(-f)),
        "gaussian": lambda: f + 0.5 * rng.normal(size=n),
    }[likelihood]()
    return t, y.astype(float)


def timed(function, repeats):
    """Median CPU seconds, after a call that compiles."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def smooth(o):
    """Filter and smoother over given Gaussian sites (unit noise), transitions included."""
    import jax
    import jax.numpy as jnp
    from bayesnewton import kernels, ops

    t, y = series(o["n"], o["grid"], "gaussian")
    kernel = kernels.Matern52(variance=1.0, lengthscale=1.0)
    gaps = jnp.asarray(np.diff(t))
    before, after = jnp.concatenate([jnp.zeros(1), gaps]), jnp.concatenate([gaps, jnp.zeros(1)])

    @jax.jit
    def run(before, after, y, noise):
        log_Z, (m, P) = ops.kalman_filter(before, kernel, y, noise)
        mean, cov, _ = ops.rauch_tung_striebel_smoother(after, kernel, m, P)
        return log_Z, mean, cov

    noise = jnp.ones((o["n"], 1, 1))
    call = lambda: jax.block_until_ready(run(before, after, jnp.asarray(y).reshape(-1, 1, 1), noise))
    log_Z, mean, cov = call()
    return {"seconds": timed(call, o["repeats"]), "log_Z": float(log_Z), "mean": float(mean.ravel()[o["n"] // 2])}


def train(o):
    """A turn of variational inference, then energy and its gradient in the hyper-parameters; the energy after ten turns."""
    import bayesnewton
    import jax
    import objax

    t, y = series(o["n"], o["grid"], o["likelihood"])
    kernel = bayesnewton.kernels.Matern52(variance=1.0, lengthscale=1.0)
    likelihoods = bayesnewton.likelihoods
    likelihood = likelihoods.Poisson(link="exp") if o["likelihood"] == "poisson" else likelihoods.Bernoulli(link="logit")
    model = getattr(bayesnewton.models, o["model"])(kernel=kernel, likelihood=likelihood, X=t[:, None], Y=y[:, None])
    optimizer = objax.optimizer.Adam(model.vars())
    energy = objax.GradValues(model.energy, model.vars())

    @objax.Function.with_vars(model.vars() + optimizer.vars())
    def step(lr):
        model.inference(lr=1.0)
        gradient, value = energy()
        optimizer(lr, gradient)
        return value

    step = objax.Jit(step)
    for _ in range(10):
        value = step(0.0)
    return {"evidence": -float(np.asarray(value[0])), "seconds": timed(lambda: jax.block_until_ready(step(0.0)), o["repeats"])}


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import jax as _jax

    _jax.config.update("jax_enable_x64", True)
    options = json.loads(sys.argv[1])
    print(json.dumps({"smooth": smooth, "train": train}[options["name"]](options)))

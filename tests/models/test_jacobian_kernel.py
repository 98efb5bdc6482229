"""JacobianKernel and LinearizedMean beside the dense Jacobian, and as gpytorch uses them."""

from __future__ import annotations

import copy

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models
from bayesgn.ggn.factors import Linear
from bayesgn.ggn.linearization import Linearizer
from bayesgn.models import StalePosteriorError, WeightPrior
from bayesgn.models.jacobian_kernel import JacobianKernel, LinearizedMean
from tests.inference.problems import assert_same, snapshot
from tests.models.problems import inputs, mlp
from tests.oracles import dense


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Pooled(nn.Module):
    """A convolution, a norm and shared positions; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 2), nn.LayerNorm(9), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.conv(x)).flatten(2)).mean(-1))


def pooled() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pooled().double().eval()


def numbers(n: int, seed: int = 4) -> Tensor:
    """Positive precisions."""
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5


def jacobian(net: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """J [n c, p]"""
    return dense.jacobian(net, x, mask=mask, rows=lambda f: f.reshape(len(f), -1)).flatten(0, 1)


def precisions(kernel: JacobianKernel) -> Tensor:
    """P's diagonal [p]."""
    return torch.cat([p.expand(b.numel) for p, b in zip(kernel.prior.of(kernel.tangent.blocks), kernel.tangent.blocks, strict=True)])


# -- the matrix ----------------------------------------------------------------------------------------------------------

PRIORS = {
    "one": lambda net: WeightPrior(2.0),
    "per layer": lambda net: WeightPrior.per_layer(net, numbers(sum(any(True for _ in m.parameters(recurse=False)) for m in net.modules()))),
    "per weight": lambda net: WeightPrior.per_weight(net, numbers(sum(p.numel() for p in net.parameters()))),
}
NETS = {"one output": (lambda: mlp(1), None), "three outputs": (lambda: mlp(3), None), "images": (pooled, (1, 4, 4))}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", NETS)
def test_the_matrix_is_that_of_the_dense_jacobian(name, prior):
    make, shape = NETS[name]
    net = make()
    x, z = inputs(5, 2 if shape is None else 16), inputs(3, 2 if shape is None else 16, seed=7)
    kernel = JacobianKernel(models.Network(net, PRIORS[prior](net), ggn.Gram), input_shape=shape)
    J, Jz = (jacobian(net, t if shape is None else t.unflatten(1, shape)) for t in (x, z))
    P = precisions(kernel)
    for _ in range(2):  # the second time from what was kept
        close(kernel(x, z).to_dense(), (J / P) @ Jz.mT)
        close(kernel(x).to_dense(), (J / P) @ J.mT)
        close(kernel(x, diag=True), (J / P * J).sum(-1))
        close(kernel(x[:3], z, diag=True), (J / P * torch.cat([Jz, Jz])[: len(J)])[: len(Jz)].sum(-1))
    assert kernel(x, z).shape == (len(J), len(Jz))
    c = len(J) // len(x)
    for j in range(c):
        close(kernel.output(j)(x, z).to_dense(), ((J / P) @ Jz.mT)[j::c, j::c])
        close(kernel.output(j)(x).diagonal(), (J / P * J).sum(-1)[j::c])


@pytest.mark.parametrize("parameters", ["last layer", "masks"])
def test_some_of_the_weights(parameters):
    net, x = mlp(2), inputs(6)
    generator = torch.Generator().manual_seed(0)
    chosen = {n: torch.rand(p.shape, generator=generator) > 0.5 for n, p in net.named_parameters()}
    mask = torch.cat([m.flatten() for m in chosen.values()])
    if parameters == "last layer":
        chosen = bgn.last_layer(net)
        mask = torch.cat([torch.full((p.numel(),), n in chosen) for n, p in net.named_parameters()])
    network = models.Network(net, WeightPrior(0.5), parameters=chosen)
    J = jacobian(net, x, mask)
    close(JacobianKernel(network)(x).to_dense(), 2 * J @ J.mT)
    close(LinearizedMean(network)(x), net(x).detach() - (J @ dense.vector(net, mask=mask)).view(6, 2))


def test_the_mean_is_that_of_the_prior_pushed_through_the_linear_functions():
    net, x = mlp(3), inputs(5)
    μ = {"0.weight": torch.full((4, 2), 0.3, dtype=torch.float64)}
    network = models.Network(net, WeightPrior(2.0, mean=μ))
    shift = torch.cat([μ.get(n, torch.zeros_like(p)).flatten() for n, p in net.named_parameters()]) - dense.vector(net)
    wanted = net(x).detach() + (jacobian(net, x) @ shift).view(5, 3)
    mean = LinearizedMean(network)
    for _ in range(2):
        close(mean(x), wanted)
    close(mean.output(1)(x), wanted[:, 1])
    one = mlp(1)
    assert LinearizedMean(models.Network(one))(x).shape == (5,)
    linear = nn.Linear(2, 1).double().eval()  # linear in its weights, whose prior mean is 0
    close(LinearizedMean(models.Network(linear))(x), torch.zeros(5, dtype=torch.float64))


def test_batches_of_inputs():
    net = mlp(2)
    kernel, mean = (thing(models.Network(net)) for thing in (JacobianKernel, LinearizedMean))
    x, z = inputs(12).view(3, 4, 2), inputs(5, seed=8)
    K, D, m = kernel(x, z).to_dense(), kernel(x, diag=True), mean(x)
    assert K.shape == (3, 8, 10) and D.shape == (3, 8) and m.shape == (3, 4, 2) and kernel(x, z).shape == K.shape
    for i in range(3):
        close(K[i], kernel(x[i], z).to_dense())
        close(D[i], kernel(x[i], diag=True))
        close(m[i], mean(x[i]))
    one = models.Network(mlp(1))
    assert LinearizedMean(one)(x).shape == (3, 4) and JacobianKernel(one)(x).to_dense().shape == (3, 4, 4)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_laws(n, c, hidden, seed):
    """PSD, symmetric, of rank p at most, equivariant in the order of the data; k scales with 1 / precision and adds up over layers."""
    net, x = mlp(c, hidden=hidden, seed=seed), inputs(n, seed=seed)
    kernel = JacobianKernel(models.Network(net, WeightPrior(2.0)))
    with torch.no_grad():
        K = kernel(x).to_dense()
        close(K, K.mT)
        λ = torch.linalg.eigvalsh(K)
        assert λ.min() > -1e-10 * λ.max()
        assert (λ > 1e-9 * λ.max()).sum() <= min(n * c, sum(p.numel() for p in net.parameters()))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        blocks = lambda M: M.view(n, c, n, c)
        close(blocks(kernel(x[order]).to_dense()), blocks(K)[order][:, :, order])
        kernel.prior.precision = 6.0
        close(kernel(x).to_dense(), K / 3)
        names = [[name for name, _ in net.named_parameters() if name[0] == i] for i in "02"]
        layers = [JacobianKernel(models.Network(net, WeightPrior(2.0), parameters=part)) for part in names]
        close(sum(layer(x).to_dense() for layer in layers), K)
        close((layers[0] + layers[1])(x).to_dense(), K)


def test_j_is_not_formed_where_it_is_an_outer_product(monkeypatch):
    net, x = mlp(3), inputs(6)
    kernel = JacobianKernel(models.Network(net, WeightPrior.per_weight(net, numbers(27)), ggn.Gram))
    wanted = kernel(x).to_dense(), kernel(x, diag=True)

    def refuse(self):
        raise AssertionError("J was formed")

    kernel = JacobianKernel(models.Network(net, WeightPrior.per_weight(net, numbers(27)), ggn.Gram))
    kernel(x[:2]).to_dense()  # engines are compared with plain autograd on the first two data
    monkeypatch.setattr(Linear, "jacobian", refuse)
    close(kernel(x).to_dense(), wanted[0])
    close(kernel(x, diag=True), wanted[1])


def test_inputs_seen_lately_are_not_linearised_again(monkeypatch):
    calls = []
    parts = Linearizer.parts
    monkeypatch.setattr(Linearizer, "parts", lambda self, x, rows: calls.append(len(x)) or parts(self, x, rows))
    net = mlp(1)
    kernel, x, z = JacobianKernel(models.Network(net)), inputs(6), inputs(4, seed=9)
    for _ in range(3):
        kernel.prior.precision = kernel.prior.precision * 1.5
        kernel(x, z.clone()).to_dense(), kernel(x.clone(), diag=True)
    assert calls == [6, 4]
    x[2] += 1.0  # in place: the numbers count, not the tensor
    J = jacobian(net, x)
    close(kernel(x).to_dense(), J @ J.mT / 1.5**3)
    assert calls == [6, 4, 6]


def test_memory_is_bounded(monkeypatch):
    from bayesgn.models import function_space

    monkeypatch.setattr(function_space, "HELD_BYTES", 1)
    net = mlp(1)
    kernel, x = JacobianKernel(models.Network(net)), inputs(8)
    for i in range(8):
        J = jacobian(net, x)
        close(kernel(x[i : i + 1], x).to_dense(), J[i : i + 1] @ J.mT)
    assert len(kernel.tangent._recent) == 2


# -- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_gradients_to_the_hyperparameter_and_to_x(prior):
    net = mlp(2)
    kernel = JacobianKernel(models.Network(net, PRIORS[prior](net), ggn.Gram))
    x, z = inputs(3), inputs(2, seed=6)
    start = kernel.prior.log_precision.detach().clone()

    def at(log_precision: Tensor) -> tuple[Tensor, Tensor]:
        K = torch.func.functional_call(Whole(kernel), {"kernel.prior.log_precision": log_precision}, (x, z))
        return K

    assert torch.autograd.gradcheck(at, start.requires_grad_())
    x, z = x.requires_grad_(), z.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, z: (kernel(x, z).to_dense(), kernel(x, diag=True)), (x, z))
    assert torch.autograd.gradcheck(LinearizedMean(models.Network(net)), (x,))
    assert all(p.grad is None for p in net.parameters())


class Whole(nn.Module):
    def __init__(self, kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernel(x, z).to_dense(), self.kernel(x, diag=True)


# -- in gpytorch ---------------------------------------------------------------------------------------------------------


class Exact(gpytorch.models.ExactGP):
    """gpytorch's exact process of a network."""

    def __init__(self, x, y, likelihood, network, kernel=None) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = LinearizedMean(network), JacobianKernel(network) if kernel is None else kernel
        several = gpytorch.distributions.MultitaskMultivariateNormal
        self.gaussian = several if y.dim() > 1 else gpytorch.distributions.MultivariateNormal

    def forward(self, x):
        return self.gaussian(self.mean_module(x), self.covar_module(x))


def exact(network, x: Tensor, y: Tensor, noise: float = 0.1) -> Exact:
    c = y.shape[-1] if y.dim() > 1 else 1
    likelihood = (
        gpytorch.likelihoods.GaussianLikelihood() if c == 1 else gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=c, has_task_noise=False)
    )
    likelihood.double().noise = torch.tensor(noise, dtype=torch.float64)
    return Exact(x, y, likelihood, network).double()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("c", [1, 3])
def test_exact_gp_equals_the_network_in_weight_space(c, prior):
    net, x, z = mlp(c, hidden=9), inputs(14), inputs(5, seed=3)
    y = torch.stack([x[:, 0].sin(), x[:, 1], x.prod(-1)], -1)[:, :c].squeeze(-1)
    network = models.Network(net, PRIORS[prior](net), ggn.Full)
    gp = exact(network, x, y)
    gp.train()
    log_evidence = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(x), y) * y.numel()
    noise = gp.likelihood.noise
    slope_noise, slope_prior = torch.autograd.grad(log_evidence, [gp.likelihood.raw_noise, gp.covar_module.prior.log_precision])
    slope_noise = slope_noise / torch.autograd.grad(noise, gp.likelihood.raw_noise)[0]

    # (The bound is the log evidence here, and its slope at fixed sites is all of its slope.)
    likelihood = likelihoods.Gaussian(torch.tensor(0.1, dtype=torch.float64))
    weights = bgn.bayes_newton(network, likelihood, (x, y), rule=bgn.rules.Variational(), tol=1e-12)
    wanted = weights.log_evidence()
    own = torch.autograd.grad(wanted, [weights.likelihood.raw_noise, weights.prior.log_precision], retain_graph=True)
    own_noise = own[0] / torch.autograd.grad(weights.likelihood.noise, weights.likelihood.raw_noise)[0]
    close(log_evidence, wanted, 1e-8)
    close(slope_noise.sum(), own_noise.sum(), 1e-8)
    close(slope_prior, own[1], 1e-8)

    gp.eval()
    p, q = gp(z), weights(z)
    close(p.mean.reshape(5, c), q.mean, 1e-8)
    close(p.covariance_matrix, q.covariance_matrix, 1e-8)
    close(p.variance.reshape(5, c), q.variance, 1e-8)
    predictive = gp.likelihood(p)
    close(predictive.variance.reshape(5, c), q.variance + 0.1, 1e-8)


def test_beyond_800_rows_with_the_setting_of_the_docstring():
    x = inputs(850)
    y = x[:, 0].sin()
    network = models.Network(mlp(1, hidden=9), WeightPrior(0.5), ggn.Full)
    weights = bgn.bayes_newton(network, likelihoods.Gaussian(torch.tensor(0.1, dtype=torch.float64)), (x, y))
    with torch.no_grad(), gpytorch.settings.max_cholesky_size(10**9):
        gp = exact(network, x, y)
        value = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)(gp.train()(x), y) * 850
        f, q = gp.eval()(x[:5] + 0.1), weights(x[:5] + 0.1)
        close(value, weights.log_evidence(), 1e-8)
        close(f.mean, q.mean[:, 0], 1e-8)
        close(f.covariance_matrix, q.covariance_matrix, 1e-8)


def test_training_by_gpytorch_reaches_the_optimum_of_maximize_evidence():
    net, x = mlp(1, hidden=9), inputs(25)
    y = x[:, 0].sin() + 0.2 * torch.randn(25, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = models.Network(net, WeightPrior(1.0), ggn.Full)
    gp = exact(network, x, y)
    gp.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    optimizer = torch.optim.LBFGS(gp.parameters(), max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -mll(gp(x), y)
        value.backward()
        return value

    optimizer.step(loss)
    tuned = bgn.bayes_newton(models.GP(JacobianKernel(network), LinearizedMean(network)), likelihoods.Gaussian(0.1), (x, y))
    bgn.maximize_evidence(tuned, tol=1e-10, progress=False)
    close(gp.covar_module.prior.precision, tuned.model.kernels[0].prior.precision, 1e-4)
    close(gp.likelihood.noise.sum(), tuned.likelihood.noise, 1e-4)
    close(-loss() * 25, tuned.log_evidence(), 1e-8)
    assert network.prior.precision.item() == pytest.approx(1.0)  # the kernel tunes its own copy


def test_a_sum_with_another_kernel_and_a_scale():
    network, x = models.Network(mlp(1), WeightPrior(2.0)), inputs(6)
    kernel = gpytorch.kernels.ScaleKernel(JacobianKernel(network)) + gpytorch.kernels.RBFKernel()
    kernel = kernel.double()
    kernel.kernels[0].outputscale = torch.tensor(3.0, dtype=torch.float64)
    close(kernel(x).to_dense(), 3 * JacobianKernel(network)(x).to_dense() + kernel.kernels[1](x).to_dense())
    kernel = JacobianKernel(models.Network(mlp(1), WeightPrior(2.0)), active_dims=(0, 2))
    close(kernel(inputs(6, 3)).to_dense(), JacobianKernel(network)(inputs(6, 3)[:, [0, 2]]).to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    net, x = mlp(1).to(dtype), inputs(6).to(torch.float32)
    kernel = JacobianKernel(models.Network(net))
    K = kernel(x).to_dense()
    J = jacobian(copy.deepcopy(net).double(), x.to(dtype).double())
    assert K.dtype == kernel.dtype == LinearizedMean(models.Network(net))(x).dtype == torch.float32
    torch.testing.assert_close(K.double(), J @ J.mT, rtol=1e-5 if dtype == torch.float32 else 0.1, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
    if dtype == torch.float32:
        gp = Exact(x, x[:, 0].sin(), gpytorch.likelihoods.GaussianLikelihood(), models.Network(net)).eval()
        assert gp(inputs(3, seed=5).float()).mean.dtype == torch.float32


# -- as a model's kernel -------------------------------------------------------------------------------------------------


def test_kernels_of_outputs_share_one_prior_and_are_tuned_as_one():
    net, x = mlp(2, hidden=6), inputs(12)
    y = torch.stack([x[:, 0].sin(), x[:, 1].cos()], -1)
    network = models.Network(net, WeightPrior(2.0))
    kernel, mean = JacobianKernel(network), LinearizedMean(network)
    model = models.GP([kernel.output(j) for j in range(2)], [mean.output(j) for j in range(2)])
    assert sum(p.numel() for p in model.parameters()) == 1
    posterior = bgn.bayes_newton(model, likelihoods.Gaussian(0.1), (x, y))
    K, m = kernel(x).to_dense().detach(), mean(x)
    per_output = [
        torch.distributions.MultivariateNormal(m[:, j], K[j::2, j::2] + 0.1 * torch.eye(12, dtype=torch.float64)).log_prob(y[:, j]) for j in range(2)
    ]
    torch.testing.assert_close(posterior.log_evidence(), sum(per_output), rtol=1e-7, atol=1e-7)
    bgn.maximize_evidence(posterior, noise=False, progress=False)
    first, second = posterior.model.kernels
    assert first.prior.log_precision is second.prior.log_precision and first.prior.precision.item() != pytest.approx(2.0)
    assert kernel.prior.precision.item() == pytest.approx(2.0) and kernel.only == -1


def test_a_posterior_is_saved_and_read_back_onto_the_same_net_alone(tmp_path):
    net, x = mlp(1), inputs(8)
    network = models.Network(net, WeightPrior(2.0))
    model = models.GP(JacobianKernel(network), LinearizedMean(network))
    posterior = bgn.bayes_newton(model, likelihoods.Bernoulli(), (x, (x[:, 0] > 0).double()), rule=bgn.rules.Variational())
    posterior.model.kernels[0].prior.precision = 3.0
    path = posterior.save(tmp_path / "gp.safetensors")
    again = bgn.load(path, model)
    close(again(x).variance, posterior(x).variance)
    other = models.Network(mlp(1, seed=5), WeightPrior(2.0))
    with pytest.raises(ValueError, match="another model"):
        bgn.load(path, models.GP(JacobianKernel(other), LinearizedMean(other)))


# -- the net is left alone -----------------------------------------------------------------------------------------------


def test_the_net_is_shared_and_left_as_it_came():
    net, x = mlp(1).train(), inputs(5)
    net[0].weight.requires_grad_(False)
    before = snapshot(net)
    network = models.Network(net, WeightPrior(2.0), parameters=[n for n, p in net.named_parameters() if p.requires_grad])
    with pytest.warns(UserWarning, match="train mode"):
        kernel, mean = JacobianKernel(network), LinearizedMean(network)
    K = kernel(x).to_dense().sum()
    K.backward()
    mean(x), kernel(x.clone().requires_grad_()).to_dense().sum().backward()
    with pytest.raises(ValueError, match="failed on inputs"):
        kernel(x[:, :1]).to_dense()
    assert_same(before, snapshot(net))
    twin = copy.deepcopy(kernel)
    assert twin.tangent.net is net and twin.prior.log_precision is not kernel.prior.log_precision
    assert [n for n, _ in kernel.named_parameters()] == ["prior.log_precision"] and not list(mean.parameters())


def test_a_net_that_moved_is_refused_and_taken_back_when_it_returns():
    net, x = mlp(1), inputs(4)
    network = models.Network(net)
    kernel, mean = JacobianKernel(network), LinearizedMean(network)
    K, m = kernel(x).to_dense(), mean(x)
    net[0].weight.data += 0.1  # which no version counter notices
    for ask in (lambda: kernel(x).to_dense(), lambda: kernel(x, diag=True), lambda: mean(x)):
        with pytest.raises(StalePosteriorError, match="Make new ones"):
            ask()
    net[0].weight.data -= 0.1
    net[0].weight.data.copy_(torch.where((net[0].weight - mlp(1)[0].weight).abs() < 1e-9, mlp(1)[0].weight, net[0].weight))
    close(kernel(x).to_dense(), K)
    close(mean(x), m)


def test_a_hook_is_part_of_the_net():
    net, x = mlp(1), inputs(4)
    kernel = JacobianKernel(models.Network(net))
    K = kernel(x).to_dense().detach()
    handle = net.register_forward_hook(lambda module, args, output: 2 * output)
    close(kernel(x).to_dense(), 4 * K)
    handle.remove()
    close(kernel(x).to_dense(), K)


# -- bad input -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_right_is_refused():
    net, x = mlp(3), inputs(4)
    network = models.Network(net)
    kernel, mean = JacobianKernel(network), LinearizedMean(network)
    for thing in (JacobianKernel, LinearizedMean):
        with pytest.raises(TypeError, match="expected models.Network"):
            thing(net)
        with pytest.raises(ValueError, match="has 16 numbers"):
            thing(models.Network(pooled()), input_shape=(1, 4, 4))(x).to_dense()
        for index in (-1, 1.0, True):
            with pytest.raises(ValueError, match="the number of an output"):
                thing(network).output(index)
    for ask in (lambda: kernel.output(3)(x).to_dense(), lambda: mean.output(3)(x)):
        with pytest.raises(ValueError, match="the net has 3"):
            ask()
    for model in (models.GP(kernel, mean), models.SparseGP(kernel, x[:2], mean)):
        with pytest.raises(ValueError, match="covers 3 outputs"):
            bgn.bayes_newton(model, likelihoods.Gaussian(0.1), (x, x[:, 0]))
    with pytest.raises(ValueError, match="input_shape"):
        JacobianKernel(models.Network(pooled()))(x).to_dense()
    with pytest.raises(ValueError, match="non-finite"):
        kernel(x * torch.nan).to_dense()
    with pytest.raises(ValueError, match="0 data"):
        kernel(x[:0]).to_dense()
    with pytest.raises(ValueError, match="as many x1"):
        kernel(x, x[:2], diag=True)
    with pytest.raises(ValueError, match="all columns together"), pytest.warns(DeprecationWarning):
        kernel(x, last_dim_is_batch=True).to_dense()
    indices = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 1)).double().eval()
    with pytest.raises(ValueError, match="x.long"):
        JacobianKernel(models.Network(indices))(x).to_dense()

"""Trained networks that nobody here wrote, unedited: fit and predict, beside an independent computation on the same weights.

Quick: every net, all layers where it is small and the last layer where it is not. Slow: all 22.7 M weights of MiniLM.
"""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models
from tests.inference.problems import assert_same, snapshot
from tests.oracles import dense
from tests.zoo import pretrained

D = torch.float64


@functools.cache
def _load(name, *args):
    return pretrained.loaded(getattr(pretrained, name), *args)


@pytest.fixture
def load():
    """A loader that reads each net once, and checks at the end that it is as it came."""
    taken = []

    def get(name, *args):
        found = _load(name, *args)
        taken.append((found.net, snapshot(found.net)))
        return found

    yield get
    for net, before in taken:
        assert_same(before, snapshot(net))


def fit(found, structure, parameters=None, prior=1.0, likelihood=None, n=None):
    x, y = (found.x, found.y) if n is None else (rows(found.x, n), found.y[:n])
    model = models.Network(found.net, models.WeightPrior(prior), structure, parameters)
    return bgn.laplace(model, likelihoods.Categorical() if likelihood is None else likelihood, (x, y), progress=False)


def rows(x, n):
    return {k: v[:n] for k, v in x.items()} if isinstance(x, dict) else x[:n]


def head_of(net):
    """The last Linear layer, found by hand."""
    return [m for m in net.modules() if isinstance(m, nn.Linear)][-1]


def features(net, x):
    """What goes into the last layer, with a 1 for its bias [n i+1], and what comes out [n c], in float64."""
    caught = []
    handle = head_of(net).register_forward_hook(lambda m, args, output: caught.append((args[0].detach(), output.detach())))
    with torch.no_grad():
        dense.call(net, x)
    handle.remove()
    a, f = caught[0]
    return torch.cat([a.double(), torch.ones(len(a), 1, dtype=D)], 1), f.double()


def weight_then_bias(c, i):
    """From row-major [W | b] to the order of the parameters."""
    W = torch.arange(c * (i + 1)).view(c, i + 1)
    return torch.cat([W[:, :i].flatten(), W[:, i]])


def last_layer_ggn(a, f):
    """Σ_n Λ_n ⊗ ã ãᵀ in the order of the parameters."""
    c, i = f.shape[1], a.shape[1] - 1
    H = torch.einsum("nkl,ni,nj->kilj", dense.softmax_ggn(f), a, a).reshape(c * (i + 1), -1)
    order = weight_then_bias(c, i)
    return H[order][:, order]


def last_layer_kron(a, f):
    """(Σ Λ_n) ⊗ (Σ ã ãᵀ) / n."""
    c, i = f.shape[1], a.shape[1] - 1
    H = torch.kron(dense.softmax_ggn(f).sum(0), a.mT @ a) / len(a)
    order = weight_then_bias(c, i)
    return H[order][:, order]


def last_layer_jacobian(a, c):
    i = a.shape[1] - 1
    J = torch.einsum("kl,ni->nkli", torch.eye(c, dtype=D), a).flatten(2)
    return J[..., weight_then_bias(c, i)]


def check_last_layer(found, n=None, prior=1.0, tol=2e-4):
    """Full and Kron over the last layer beside closed forms on the layer's inputs, taken in float64."""
    x, y = (found.x, found.y) if n is None else (rows(found.x, n), found.y[:n])
    a, f = features(found.net, x)
    test = rows(found.x_test if found.x_test is not None else found.x, 16)
    a_test, f_test = features(found.net, test)
    head, c = head_of(found.net), f.shape[1]
    theta = torch.cat([head.weight.detach().flatten(), head.bias.detach()]).double()
    precision = torch.full_like(theta, prior)
    log_lik = F.log_softmax(f, -1).gather(1, y[:, None]).sum()
    for structure, H in ((ggn.Full, last_layer_ggn(a, f)), (ggn.Kron, last_layer_kron(a, f))):
        posterior = fit(found, structure, bgn.last_layer(found.net), prior, n=n)
        assert len(posterior.mean) == len(theta)
        wanted = dense.log_evidence(log_lik, theta, 0.0, precision, H)
        assert posterior.log_evidence().item() == pytest.approx(wanted.item(), rel=tol)
        answer = posterior(test)
        torch.testing.assert_close(answer.mean.double(), f_test, rtol=1e-4, atol=1e-4)
        cov = dense.function_cov(last_layer_jacobian(a_test, c), dense.posterior_cov(H, precision))
        _, found_cov = answer.marginals()
        assert (found_cov.double() - cov).norm() < tol * cov.norm()
        probs = posterior.likelihood(answer).probs
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
        assert probs.max(-1).values.mean() <= f_test.softmax(-1).max(-1).values.mean() + 1e-6  # never surer than the net itself


# -- digits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ccexam_mnist", "ccexam_usps"])
def test_digits_last_layer(name, load):
    check_last_layer(load(name))


@pytest.mark.parametrize("name", ["ccexam_mnist", "ccexam_usps"])
def test_digits_all_layers_through_the_exact_dual(name, load):
    """Every weight of the net: Gram beside Woodbury on brute-force Jacobians (one autograd.grad for each output of each datum)."""
    found, n = load(name), 4
    posterior = fit(found, ggn.Gram, n=n)
    x, test = found.x[:n], found.x_test[:2]
    J, J_test = (dense.jacobian(found.net, part).flatten(0, 1) for part in (x, test))
    f = dense.outputs(found.net, x)
    S = torch.block_diag(*dense.psd_root(dense.softmax_ggn(f)))
    K = S.mT @ (J @ J.mT) @ S  # the prior has unit precision
    M = torch.eye(len(K), dtype=D) + K
    cross = J_test @ J.mT @ S
    cov = J_test @ J_test.mT - cross @ torch.linalg.solve(M, cross.mT)
    answer = posterior(test)
    assert (answer.covariance_matrix.double() - cov).norm() < 1e-3 * cov.norm()
    theta = dense.vector(found.net)
    log_lik = F.log_softmax(f, -1).gather(1, found.y[:n, None]).sum()
    wanted = log_lik - 0.5 * theta.square().sum() - 0.5 * torch.linalg.slogdet(M).logabsdet
    assert posterior.log_evidence().item() == pytest.approx(wanted.item(), rel=1e-4)


def test_digits_all_layers_kron(load):
    """USPSNet by Kron on all layers: its last block is the hand-made one, and it knows what it does not know."""
    found = load("ccexam_usps")
    posterior = fit(found, ggn.Kron, n=64, prior=20.0)
    head = fit(found, ggn.Kron, bgn.last_layer(found.net), 20.0, n=64)
    p = len(head.mean)  # blocks are independent: the last layer's variances are those of a last-layer fit
    torch.testing.assert_close(posterior.weight_variance()[-p:], head.weight_variance(), rtol=1e-3, atol=1e-6)
    probs = posterior.likelihood(posterior(found.x_test[:64])).probs
    plain = found.net(found.x_test[:64]).detach()
    y = found.y_test[:64]
    assert (probs.argmax(-1) == y).float().mean() > 0.7
    # trained elsewhere and over-confident here: the posterior's NLL is lower
    assert F.nll_loss(probs.log(), y) < F.cross_entropy(plain, y)
    noise = torch.randn(found.x_test[:64].shape, generator=torch.Generator().manual_seed(0))
    entropy = posterior.likelihood(posterior(noise)).entropy().mean() - posterior.likelihood(posterior(found.x_test[:64])).entropy().mean()
    assert entropy > 0.1


@pytest.mark.parametrize("name", ["mnist", "usps", "svhn"])
def test_sample_images_without_a_data_set(name, load):
    """In-place ReLUs, BatchNorm, Dropout: Diag beside squared gradients, one for each output of each datum."""
    found = load("ccexam_samples", name)
    posterior = fit(found, ggn.Diag)
    wanted = 1 / (1 + diagonal(found))
    torch.testing.assert_close(posterior.weight_variance(), wanted, rtol=1e-3, atol=1e-4)
    assert posterior(found.x).variance.isfinite().all()


def diagonal(found):
    """diag Σ JᵀΛJ by autograd, one column of the root of one datum at a time."""
    q = [p for p in found.net.parameters() if p.requires_grad]
    total = 0.0
    for n in range(len(found.x)):
        f = dense.call(found.net, found.x[n : n + 1])[0]
        S = dense.psd_root(dense.softmax_ggn(f.detach().double()))
        for s in S.mT:
            grads = torch.autograd.grad(f, q, s.to(f), retain_graph=True)
            total = total + torch.cat([g.flatten() for g in grads]).double().square()
    return total


# -- sounds ------------------------------------------------------------------------------------------------------------------


def test_crepe_has_passed_a_sigmoid(load):
    """A sigmoid stands at the end of CREPE: as logits it is refused with a warning, as probabilities it is served exactly."""
    found = load("crepe")
    data = (found.x, (found.y > 0.5).float())
    model = models.Network(found.net, structure=ggn.Diag, parameters=bgn.named(found.net, "classifier"))
    with pytest.warns(UserWarning, match=r"latent values lie in \[0, 1\] .*passed a sigmoid already; logits are expected"):
        bgn.laplace(model, likelihoods.Bernoulli(), data, progress=False)
    likelihood = likelihoods.FromDistribution(lambda f: torch.distributions.Bernoulli(probs=f))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = bgn.laplace(model, likelihood, data, progress=False)
    # ∂p/∂logit = p (1 − p) and Λ = 1 / (p (1 − p)): in all p (1 − p), as if the logits had been given
    a, f = features(found.net, found.x)
    p = f.sigmoid()
    H = torch.einsum("no,ni->oi", p * (1 - p), a.square())
    wanted = 1 / (1 + torch.cat([H[:, :-1].flatten(), H[:, -1]]))
    torch.testing.assert_close(posterior.weight_variance(), wanted, rtol=1e-3, atol=1e-4)
    a_test, f_test = features(found.net, found.x[:2])
    slope = f_test.sigmoid() * (1 - f_test.sigmoid())
    V = torch.cat([wanted[: -f.shape[1]].view(f.shape[1], -1), wanted[-f.shape[1] :, None]], 1)
    variance = slope.square() * (a_test.square() @ V.mT)
    torch.testing.assert_close(posterior(found.x[:2]).variance.double(), variance, rtol=1e-3, atol=1e-6)


# -- text --------------------------------------------------------------------------------------------------------------------


def test_minilm_last_layer(load):
    """The head stands at its ridge solution, so the closed form is the textbook's Bayesian logistic regression."""
    found = load("minilm", 64)
    check_last_layer(found)
    posterior = fit(found, ggn.Full, bgn.last_layer(found.net))
    y = found.y_test
    probs = posterior.likelihood(posterior(found.x_test)).probs
    assert (probs.argmax(-1) == y).float().mean() > 0.7 and F.nll_loss(probs.log(), y) < 1.0  # of log 4 = 1.39
    batches = [{**{k: v[i : i + 16] for k, v in found.x.items()}, "labels": found.y[i : i + 16]} for i in range(0, 64, 16)]
    model = models.Network(found.net, structure=ggn.Full, parameters=bgn.last_layer(found.net))
    again = bgn.laplace(model, likelihoods.Categorical(), batches, progress=False)  # as a Hugging Face loader gives them
    assert again.log_evidence().item() == pytest.approx(posterior.log_evidence().item(), rel=1e-5)


@pytest.mark.slow
def test_minilm_all_layers(load):
    """22.7 M weights: Kron, and Diag beside squared gradients."""
    found = load("minilm", 64)
    x, y, test = rows(found.x, 8), found.y[:8], rows(found.x_test, 4)
    model = models.Network(found.net, models.WeightPrior(100.0), ggn.Kron)
    posterior = bgn.laplace(model, likelihoods.Categorical(), (x, y), progress=False)
    f = posterior(test)
    assert f.variance.isfinite().all() and (f.variance > 0).all() and posterior.log_evidence().isfinite()
    head = bgn.laplace(
        models.Network(found.net, models.WeightPrior(100.0), ggn.Kron, bgn.last_layer(found.net)), likelihoods.Categorical(), (x, y), progress=False
    )
    assert (f.variance >= head(test).variance - 1e-6).all()  # more weights are uncertain
    model = models.Network(found.net, models.WeightPrior(100.0), ggn.Diag)
    diag = bgn.laplace(model, likelihoods.Categorical(), (x, y), progress=False)
    q, total = [p for p in found.net.parameters() if p.requires_grad], 0.0
    for n in range(8):
        logits = found.net(**{k: v[n : n + 1] for k, v in x.items()})[0]
        for s in dense.psd_root(dense.softmax_ggn(logits.detach().double())).mT:
            grads = torch.autograd.grad(logits, q, s.to(logits), retain_graph=True, allow_unused=True, materialize_grads=True)
            total = total + torch.cat([g.flatten() for g in grads]).double().square()
    found_variance, wanted = diag.weight_variance(), 1 / (100 + total)
    assert (found_variance - wanted).norm() < 1e-3 * wanted.norm()


# -- timm --------------------------------------------------------------------------------------------------------------------


def test_resnet10t(load):
    """BatchNorm and in-place ReLUs of a net from timm: all layers by Diag beside squared gradients, the last layer in closed form."""
    found = load("timm_random", "resnet10t", 4, 32, 2)
    check_last_layer(found, tol=1e-3)
    posterior = fit(found, ggn.Diag)
    wanted = 1 / (1 + diagonal(found))
    assert (posterior.weight_variance() - wanted).norm() < 1e-3 * wanted.norm()
    assert posterior(found.x).variance.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"])
def test_architectures_of_timm(name, load):
    """Kron over all layers: finite, and its head is that of a last-layer fit."""
    found = load("timm_random", name, 4, 32, 3)
    posterior = fit(found, ggn.Kron, prior=10.0)
    f = posterior(found.x)
    assert f.variance.isfinite().all() and (f.variance > 0).all() and posterior.log_evidence().isfinite()
    diag = fit(found, ggn.Diag)
    wanted = 1 / (1 + diagonal(found))
    assert (diag.weight_variance() - wanted).norm() < 1e-3 * wanted.norm()

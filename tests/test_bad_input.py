"""Bad input: a clear error or warning that shows the value, says what was expected and what to do. Never a silent wrong number."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models, rules
from tests.inference.problems import assert_same, snapshot
from tests.models.problems import Problem, close, fit, inputs, mlp, of

D = torch.float64
NAN, INF = float("nan"), float("inf")
X, Y, LABELS = inputs(12), inputs(12, seed=3), torch.arange(12) % 2
GAUSSIAN = likelihoods.Gaussian(torch.tensor(0.3, dtype=D))
ONE_PASS = [ggn.Full, ggn.Layerwise, ggn.Kron, ggn.Diag, ggn.Gram]
TWO_PASS = [ggn.EigenKron, ggn.Gram(inducing=4)] + [ggn.LowRank(3, memory=0)]
NET = mlp(2)


class Answers(nn.Module):
    """The net with something done to its answer."""

    def __init__(self, change, net=None):
        super().__init__()
        self.net, self.change = mlp(2) if net is None else net, change

    def forward(self, x):
        return self.change(self.net(x))


def laplace(net=NET, likelihood=GAUSSIAN, data=(X, Y), structure=ggn.Full, **options):
    return bgn.laplace(models.Network(net.eval(), structure=structure), likelihood, data, progress=False, **options)


def refused(error, message, **arguments):
    """`laplace` raises this and leaves the net as it was."""
    net = arguments.setdefault("net", mlp(2)).eval()
    before = snapshot(net)
    with pytest.raises(error, match=message):
        laplace(**arguments)
    assert_same(before, snapshot(net))


def with_value(t, value, at=(7, 1)):
    t = t.clone()
    t[at] = value
    return t


# -- NaN and inf -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("structure", [*ONE_PASS, ggn.EigenKron], ids=lambda s: s.__name__)
def test_non_finite_x(structure, value):
    bad = with_value(X, value)
    message = rf"x holds 1 non-finite value\(s\), the first {value} at index \(7, 1\) of shape \(12, 2\); clean the data"
    refused(ValueError, message, data=(bad, Y), structure=structure)
    refused(ValueError, message.replace("7, 1", "1, 1").replace("12, 2", "6, 2"), data=[(X[:6], Y[:6]), (bad[6:], Y[6:])], structure=structure)
    refused(ValueError, message, data=DataLoader(TensorDataset(bad, Y), batch_size=12), structure=structure)
    refused(ValueError, "x holds 1 non-finite|more than once", data=iter([(bad, Y)]), structure=structure)


@pytest.mark.parametrize("value", [NAN, INF])
def test_non_finite_x_in_predictions(value):
    posterior = laplace()
    for use in (posterior, lambda x: posterior.sample_outputs(x, 2), posterior.sample_functions(2)):
        with pytest.raises(ValueError, match=rf"x holds 1 non-finite value\(s\), the first {value} at index \(7, 1\)"):
            use(with_value(X, value))


def test_non_finite_y():
    advice = "but targets must be finite .NaN marks a missing one.; clean the data or mark such targets as NaN"
    for likelihood in (GAUSSIAN, likelihoods.StudentT()):
        refused(ValueError, rf"y contains inf \(1 of 24 values like it\) {advice}", likelihood=likelihood, data=(X, with_value(Y, INF)))
    missing = laplace(data=(X, with_value(Y, NAN, 7)))  # a missing target is documented, and counts for nothing
    kept = torch.arange(12) != 7
    close(missing.log_evidence(), laplace(data=(X[kept], Y[kept])).log_evidence())
    message = r"y has dtype torch.float32 \(first value nan\) but class labels are integers; use y.long\(\), or Gaussian\(\)"
    refused(TypeError, message, likelihood=likelihoods.Categorical(), data=(X, torch.full((12,), NAN)))


def switch(net):
    """First output −1 at x = 0, far above 50 for large positive x."""
    net[0].weight.data.abs_()
    net[0].bias.data.zero_()
    net[2].weight.data[0] = 100.0
    net[2].bias.data[0] = -1.0


@pytest.mark.parametrize("likelihood, y", [(GAUSSIAN, Y), (likelihoods.Categorical(), LABELS)], ids=["Gaussian", "Categorical"])
@pytest.mark.parametrize("structure", ONE_PASS, ids=lambda s: s.__name__)
def test_non_finite_output(structure, likelihood, y):
    everywhere = Answers(lambda f: (f - 100).log())
    refused(ValueError, r"the net's output holds 4 non-finite value\(s\), the first nan at index \(0, 0\)", net=everywhere,
            likelihood=likelihood, data=(X, y), structure=structure)  # fmt: skip
    # only where x is large: the first data are well, so that the plan is settled on them
    late = Answers(lambda f: f / (f.detach()[:, :1] < 50))
    big = torch.zeros_like(X)
    big[9] = 1e4
    switch(late.net)
    refused(ValueError, "f has 2 NaN or infinite values, the first in row .*look for NaN in the inputs or a diverged net", net=late,
            likelihood=likelihood, data=(big, y), structure=structure)  # fmt: skip


def test_non_finite_output_of_a_prediction():
    net = Answers(lambda f: f / (f.detach()[:, :1] < 50))
    switch(net.net)
    posterior = laplace(net=net, data=(0 * X, Y))
    with pytest.raises(ValueError, match="the net's output holds 2 non-finite"):
        posterior(torch.full((1, 2), 1e4, dtype=D))


# -- labels and shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "y, error, message",
    [
        (LABELS + 1, ValueError, r"y contains 2 \(6 of 12 values like it\) but f has 2 classes, so labels run from 0 to 1; count classes from 0"),
        (LABELS - 1, ValueError, r"y contains -1 \(6 of 12 .*ignore_index=-100"),
        (LABELS.double(), TypeError, r"y has dtype torch.float64 \(first value 0.0\) but class labels are integers; use y.long\(\)"),
        (F.one_hot(LABELS), ValueError, r"y has shape \[12, 2\] but f has shape \[12, 2\], for which y should be \[12\]; reshape y"),
        (F.one_hot(LABELS).double(), ValueError, r"class indices \[...\] are expected, not probabilities or one-hot .* use y.argmax\(-1\)"),
        (LABELS[:5], ValueError, r"x has 12 rows but y has 5 \(shape \(5,\)\); they must match"),
    ],
    ids=["too large", "negative", "float", "one-hot", "probabilities", "too few"],
)
def test_labels(y, error, message):
    refused(error, message, likelihood=likelihoods.Categorical(), data=(X, y))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_labels_of_any_integer_type(dtype):
    found = laplace(likelihood=likelihoods.Categorical(), data=(X, LABELS.to(dtype)))
    close(found.log_evidence(), laplace(likelihood=likelihoods.Categorical(), data=(X, LABELS)).log_evidence())


def test_targets_outside_their_support():
    refused(ValueError, r"y contains 2.0 .* but labels are 0 or 1", likelihood=likelihoods.Bernoulli(), data=(X, torch.full((12, 2), 2.0)))
    refused(ValueError, r"y contains -1.0", likelihood=likelihoods.Poisson(), data=(X, -torch.ones(12, 2)))
    refused(ValueError, r"y contains 0.0|y contains -", likelihood=likelihoods.Gamma(), data=(X, torch.zeros(12, 2)))
    refused(ValueError, r"y contains 2.0", likelihood=likelihoods.Beta(), data=(X, torch.full((12, 2), 2.0)))


def test_shapes():
    refused(ValueError, r"y has shape \[12\] but f has shape \[12, 2\], for which y should be \[12, 2\]; reshape y", data=(X, Y[:, 0]))
    refused(ValueError, r"y has shape \[12, 3\] but f has shape \[12, 2\]", data=(X, torch.cat([Y, Y[:, :1]], 1)))
    refused(ValueError, r"f has shape \[2, 1\]|f has shape \[12, 1\], a single class; use Bernoulli\(\)", net=mlp(1),
            likelihood=likelihoods.Categorical(), data=(X, LABELS))  # fmt: skip
    # nothing is broadcast: [n] beside [n 1] would be [n n]
    column = laplace(net=mlp(1), data=(X, Y[:, 0]))
    close(column.log_evidence(), laplace(net=mlp(1), data=(X, Y[:, :1])).log_evidence())
    refused(RuntimeError, r"Sequential \(weights torch.float64 on cpu\) failed on a tensor of shape \(2, 1\) and dtype torch.float64: mat1",
            data=(X[:, :1], Y))  # fmt: skip
    refused(RuntimeError, "failed on a tensor of shape .* and dtype torch.float32: .*dtype", data=(X.float(), Y))
    posterior = laplace()
    with pytest.raises(RuntimeError, match=r"failed on a tensor of shape \(12, 1\)"):
        posterior(X[:, :1])
    with pytest.raises(ValueError, match=r"x is a tensor of shape \(0, 2\) and dtype torch.float64: 0 data"):
        posterior(X[:0])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda f: f.mean(0), ValueError, r"the net answered 2 rows for 3 data \(output \(2, 1\)\); the first dimension of its output must"),
        (lambda f: f.mT, ValueError, r"the net answered 2 rows for 3 data \(output \(2, 3\)\)"),
        (lambda f: f.mean(0, keepdim=True), ValueError, r"the net answered 1 rows for 2 data"),
        (lambda f: f.sum(), ValueError, r"the net answered a single number for 2 data \(output \(\)\)"),
        (lambda f: torch.cat([f, f]), ValueError, r"the net answered 4 rows for 2 data"),
        (lambda f: (f, f), TypeError, r"the net returned a tuple of 2: .*; expected a tensor or an object with tensor `.logits`. Wrap the net"),
        (lambda f: None, TypeError, r"the net returned None .*expected a tensor"),
        (lambda f: {"probs": f}, TypeError, r"the net returned a mapping with keys \['probs'\]"),
        (lambda f: f.detach(), ValueError, r"the net's output does not depend on the selected parameters .was it computed under no_grad or detached"),
        (lambda f: f.argmax(-1), ValueError, "does not depend on the selected parameters"),
        (lambda f: torch.complex(f, f), TypeError, "f has dtype torch.complex128 but must be floating point"),
    ],
    ids=["mean", "transposed", "one row", "scalar", "twice", "tuple", "None", "mapping", "detached", "integers", "complex"],
)
def test_answers_that_are_not_one_row_for_each_datum(change, error, message):
    refused(error, message, net=Answers(change))


def test_a_likelihood_that_does_not_fit_the_net():
    refused(ValueError, r"noise has shape \[3\] but f has shape \[., 2\]|noise has shape \[3\]", likelihood=likelihoods.Gaussian(torch.ones(3)))
    refused(ValueError, "an odd number of latents", net=mlp(3), likelihood=likelihoods.HeteroscedasticGaussian(), data=(X, Y[:, :1]))
    refused(ValueError, "weight has 3 entries but f has shape", likelihood=likelihoods.Categorical(weight=torch.ones(3)), data=(X, LABELS))


# -- loaders -----------------------------------------------------------------------------------------------------------------


def test_empty_loaders():
    refused(ValueError, r"the data are empty \(0 rows\); there is nothing to condition on", data=(X[:0], Y[:0]))
    refused(ValueError, r"the loader gave no data \(0 batches, 0 rows\)", data=[])
    refused(ValueError, r"the loader gave no data \(0 batches", data=DataLoader(TensorDataset(X, Y), batch_size=100, drop_last=True))
    refused(ValueError, r"the loader gave no data \(2 batches, 0 rows\)", data=[(X[:0], Y[:0])] * 2)
    refused(ValueError, "the iterator gave no data: it is empty or was walked before. Pass a DataLoader or a list", data=iter([]))
    walked = iter([(X, Y)])
    list(walked)
    refused(ValueError, "the iterator gave no data", data=walked)
    posterior = laplace()
    with pytest.raises(ValueError, match="the loader gave no data"):
        posterior.condition([])


@pytest.mark.parametrize("structure", [*ONE_PASS, *TWO_PASS], ids=str)
def test_empty_batches_among_others_are_passed_over(structure):
    data = [(X[:0], Y[:0]), (X[:5], Y[:5]), (X[:0], Y[:0]), (X[5:], Y[5:])]
    found, wanted = laplace(data=data, structure=structure), laplace(data=[(X[:5], Y[:5]), (X[5:], Y[5:])], structure=structure)
    assert found.num_data == 12
    close(found.log_evidence(), wanted.log_evidence(), 1e-9)


@pytest.mark.parametrize("structure", ONE_PASS, ids=lambda s: s.__name__)
def test_once_only_iterators_serve_one_pass(structure):
    batches = ((X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8))
    found = laplace(data=batches, structure=structure)
    assert found.num_data == 12
    close(found.log_evidence(), laplace(structure=structure).log_evidence(), 1e-10)
    more = found.condition(iter([(X, Y)]))
    assert more.num_data == 24


class Drained:
    """A loader that looks as if it could be walked again, but draws from one generator: what is taken is gone."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return (b for b in self.batches)


class Stream(IterableDataset):
    def __init__(self):
        self.data = iter(zip(X, Y, strict=True))

    def __iter__(self):
        return self.data


@pytest.mark.parametrize("structure", ONE_PASS, ids=lambda s: s.__name__)
def test_once_only_loaders_in_disguise_lose_no_batch(structure):
    for data in (Drained([(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]), DataLoader(Stream(), batch_size=4)):
        found = laplace(data=data, structure=structure)
        assert found.num_data == 12
        close(found.log_evidence(), laplace(structure=structure).log_evidence(), 1e-10)


@pytest.mark.parametrize("structure", TWO_PASS, ids=str)
def test_once_only_data_and_a_structure_of_several_passes(structure):
    refused(ValueError, "walks the data more than once, but an iterator can be walked once; pass a DataLoader", data=iter([(X, Y)]),
            structure=structure)  # fmt: skip
    refused(ValueError, "the first walk gave 12 data, this one 0. Pass a loader that gives the same data at every walk",
            data=Drained([(X[:6], Y[:6]), (X[6:], Y[6:])]), structure=structure)  # fmt: skip


@pytest.mark.parametrize(
    "data, error, message",
    [
        (None, TypeError, "data is None .*expected a DataLoader, a pair"),
        (X, TypeError, r"data is a tensor of shape \(12, 2\)"),
        (X.numpy(), TypeError, r"data is a numpy ndarray of shape \(12, 2\)"),
        ((X.numpy(), Y.numpy()), TypeError, r"data is a pair of a numpy ndarray of shape \(12, 2\) and .*torch.from_numpy\(x\)"),
        ("train.csv", TypeError, r"a batch is 't' \(str\); expected a pair"),
        ([X], TypeError, r"a batch is a tensor of shape \(12, 2\)"),
        ([(X, Y.numpy())], TypeError, "targets are a numpy ndarray .*torch.from_numpy"),
        ([(X.numpy(), Y)], TypeError, "an input is a numpy ndarray .*torch.from_numpy"),
        ([{"input": X}], ValueError, r"keys \['input'\] has no targets; expected one of \['labels'"),
        ([(X, Y.sum())], ValueError, "targets are a single number"),
        ([(X, Y), None], TypeError, r"a batch is None \(NoneType\)"),
        (DataLoader(TensorDataset(X)), TypeError, "a batch is a list of 1"),
    ],
)
def test_loaders_that_yield_odd_things(data, error, message):
    refused(error, message, data=data)


def test_arguments_that_are_something_else():
    for likelihood, message in (
        ("regression", r"likelihood is 'regression' \(str\); expected one of bayesgn.likelihoods: Categorical\(\) for a net trained by"),
        (nn.CrossEntropyLoss(), r"likelihood is CrossEntropyLoss\(\)"),
        (likelihoods.Gaussian, r"likelihood is the class Gaussian; pass an object: likelihoods.Gaussian\(...\)"),
    ):
        refused(TypeError, message, likelihood=likelihood)
    for rule, message in (
        (rules.EmpiricalFisher(), r"rule=EmpiricalFisher\(\); expected a rule, .* rules.Laplace\(curvature=rules.EmpiricalFisher\("),
        (rules.GaussNewton, r"expected a rule, an expansion with a curvature: rules.Laplace\(curvature=rules.GaussNewton"),
        (rules.Laplace, r"is a class; expected a rule, an expansion with a curvature: rules.Laplace\(...\)"),
        ("ggn", r"rule='ggn' is a str; expected a rule such as rules.Laplace\(\)"),
    ):
        refused(TypeError, message, rule=rule)
    with pytest.raises(TypeError, match=r"model is a Sequential; wrap the net first: models.Network\(net\)"):
        bgn.laplace(NET, GAUSSIAN, (X, Y))
    for options, message in (
        ({"net": nn.Linear}, "net is a type; expected a torch.nn.Module"),
        ({"prior": 1.0}, r"prior=1.0; pass models.WeightPrior\(1.0\)"),
        ({"prior": "isotropic"}, r"prior='isotropic' is a str; expected a models.WeightPrior"),
        ({"structure": "kron"}, r"structure='kron'; expected a structure such as ggn.Kron"),
        ({"parameters": "2.weight"}, r"parameters='2.weight' is a str; pass a list of names"),
        ({"parameters": list(NET.parameters())}, "parameters holds Parameter objects; expected names"),
    ):
        with pytest.raises(TypeError, match=message):
            models.Network(**{"net": NET, **options})
    posterior = laplace()
    for n in (0, -1, 1.5, True, None):
        for use in (posterior.sample_weights, posterior.sample_functions, lambda n: posterior.sample_outputs(X, n)):
            with pytest.raises(ValueError, match=f"n={n} samples; expected a whole number, at least 1"):
                use(n)


# -- the net's state ---------------------------------------------------------------------------------------------------------


def dropout_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()
        net(torch.randn(64, 2, dtype=D))  # running statistics that mean something
    return net


@pytest.mark.parametrize("structure", ONE_PASS, ids=lambda s: s.__name__)
def test_train_mode_warns_and_answers_as_eval(structure):
    net = dropout_net().train()
    before = snapshot(net)
    model = models.Network(net, structure=structure)
    with pytest.warns(UserWarning, match=r"Sequential is in train mode; bayesgn evaluates it in eval mode .dropout off.*net.eval\(\) to silence"):
        found = bgn.laplace(model, GAUSSIAN, (X, Y), progress=False)
    assert_same(before, snapshot(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = laplace(net=dropout_net().eval(), structure=structure)
        close(found(X).mean, wanted(X).mean, 1e-12)
    close(found(X).variance, wanted(X).variance, 1e-10)
    close(found.log_evidence(), wanted.log_evidence(), 1e-10)
    assert torch.equal(found.sample_outputs(X, 2, torch.Generator().manual_seed(0)), found.sample_outputs(X, 2, torch.Generator().manual_seed(0)))
    assert net.training


def test_dropout_that_eval_mode_does_not_stop():
    with pytest.warns(UserWarning, match="answers of Answers are random: two calls with the same x differ .*functional dropout without"):
        laplace(net=Answers(lambda f: F.dropout(f, 0.5)))


def test_statistics_over_the_batch():
    """Data that see one another: J is not a datum's own, and predictions would change with the batch they come in."""
    with pytest.warns(UserWarning, match="for a datum depend on the other data of its batch .*statistics over the batch"):
        laplace(net=Answers(lambda f: f - f.mean(0)))
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)).double()
    with pytest.warns(UserWarning, match="depend on the other data of its batch"), pytest.raises(ValueError, match="more than 1 value"):
        laplace(net=net, structure=ggn.Diag)


def test_ordinary_nets_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laplace(net=dropout_net())
        laplace(likelihood=likelihoods.Categorical(), data=(X, LABELS))
        laplace(likelihood=likelihoods.Bernoulli(), data=(X, Y > 0))


def test_frozen_nets():
    net = mlp(2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"Sequential has no parameter with requires_grad=True \(4 parameters, all frozen\); unfreeze some, or name"):
        models.Network(net)
    posterior = bgn.laplace(models.Network(net, structure=ggn.Full, parameters=bgn.last_layer(net)), GAUSSIAN, (X, Y), progress=False)
    close(posterior(X).variance, fit(Problem(mlp(2), X, Y, GAUSSIAN), parameters=bgn.last_layer(net))(X).variance)
    assert not any(p.requires_grad for p in net.parameters())


def test_a_layer_frozen_after_the_prior_was_made():
    net = mlp(2)
    prior = models.WeightPrior.per_weight(net)
    net[0].requires_grad_(False)
    with pytest.raises(ValueError, match="the prior has 22 precisions but 10 weights are selected; was a layer frozen after it was made"):
        models.Network(net, prior)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    net = mlp(2).to(dtype)
    posterior = laplace(net=net, data=(X.to(dtype), Y.to(dtype)))
    f = posterior(X.to(dtype))
    assert f.variance.isfinite().all() and f.variance.dtype == torch.float32 and posterior.log_evidence().dtype == D
    assert next(net.parameters()).dtype == dtype
    if dtype == torch.float16:  # 65504 is the largest
        loud = Answers(lambda f: f * 60000, mlp(2).to(dtype))
        refused(ValueError, "the net's output holds .* non-finite .*the net's scale and dtype", net=loud, data=(30 * X.to(dtype), Y.to(dtype)))


# -- precisions and noises ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_precisions(value):
    message = rf"prior precision {re.escape(str(value))} is not positive and finite; a precision is an inverse variance, e.g. 1.0"
    posterior = laplace()
    many = torch.tensor([1.0, value])
    for use in (
        lambda: models.WeightPrior(value),
        lambda: models.WeightPrior(many),
        lambda: models.WeightPrior.per_layer(NET, many),
        lambda: models.WeightPrior.per_weight(NET, value),
        lambda: setattr(posterior.prior, "precision", value),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert posterior.prior.precision.item() == 1.0
    for use in (lambda: likelihoods.Gaussian(value), lambda: setattr(posterior.likelihood, "noise", value)):
        with pytest.raises(ValueError, match="noise must be positive and finite but is "):
            use()
    with pytest.raises(ValueError, match="scale must be positive and finite but is"):
        likelihoods.StudentT(scale=value)


def test_precisions_that_are_no_numbers():
    for value in ("1.0", None):
        with pytest.raises(TypeError, match=f"prior precision is {value!r}; expected a positive number"):
            models.WeightPrior(value)
    posterior = laplace()
    with pytest.raises(ValueError, match=r"the prior's precision has shape \(\) but the new value \(4,\)"):
        posterior.prior.precision = torch.ones(4)
    with pytest.raises(ValueError, match="the prior mean of all weights holds nan"):
        models.WeightPrior(1.0, mean=NAN)
    with pytest.raises(ValueError, match="the prior mean of 2.bias holds inf"):
        models.WeightPrior(1.0, mean={"2.bias": torch.tensor([1.0, INF])})
    with pytest.raises(TypeError, match="mean is a Tensor; expected a number, or tensors by parameter name"):
        models.WeightPrior(1.0, mean=torch.zeros(22))


# -- outputs that have been through their link ---------------------------------------------------------------------------------


def test_softmaxed_outputs_warn():
    with pytest.warns(UserWarning, match="every row of f is nonnegative and sums to 1, so the net's output seems to be softmaxed .*take the softmax"):
        laplace(net=Answers(lambda f: f.softmax(-1)), likelihood=likelihoods.Categorical(), data=(X, LABELS))
    with warnings.catch_warnings():  # its logarithm is as good as logits
        warnings.simplefilter("error")
        by_log = laplace(net=Answers(lambda f: f.log_softmax(-1)), likelihood=likelihoods.Categorical(), data=(X, LABELS))
    by_logits = laplace(likelihood=likelihoods.Categorical(), data=(X, LABELS))
    close(by_log.log_evidence(), by_logits.log_evidence())


def test_sigmoids_warn():
    message = r"all 24 latent values lie in \[0, 1\] .*passed a sigmoid already; logits are expected: take the sigmoid out"
    with pytest.warns(UserWarning, match=message):
        laplace(net=Answers(torch.sigmoid), likelihood=likelihoods.Bernoulli(), data=(X, Y > 0))


# -- unfitted and stale ------------------------------------------------------------------------------------------------------


def test_a_model_is_no_posterior():
    model = models.Network(NET)
    with pytest.raises(RuntimeError, match=r"this Network has seen no data: posterior = bgn.laplace\(model, likelihood, train_loader\)"):
        model(X)


def test_a_stale_posterior():
    net = mlp(2)
    posterior = laplace(net=net)
    net[0].weight.data.mul_(1.01)
    with pytest.raises(models.StalePosteriorError, match="weights or buffers of Sequential changed after the posterior was made"):
        posterior(X)


# -- devices -----------------------------------------------------------------------------------------------------------------


def test_the_meta_device_holds_no_numbers():
    message = r"shape \(12, 2\) and dtype torch.float64 on the meta device, which holds no numbers; pass real data .the net is on cpu"
    for data in ((X.to("meta"), Y), (X, Y.to("meta")), [(X.to("meta"), Y.to("meta"))]):
        refused(ValueError, message, data=data)
    with pytest.raises(ValueError, match=message):
        laplace()(X.to("meta"))
    net = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="weight and 1 more tensors of Linear are on the meta device, .*load the trained weights first"):
        models.Network(net)
    part = mlp(2)
    part.register_buffer("table", torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="table and 0 more tensors"):
        models.Network(part)


@pytest.mark.gpu
def test_data_go_to_the_nets_device():
    net = mlp(2).cuda()
    posterior = laplace(net=net)
    assert posterior(X).mean.is_cuda
    close(posterior(X).variance.cpu(), laplace()(X).variance)


# -- degenerate, but right ---------------------------------------------------------------------------------------------------


def test_one_datum_and_identical_data():
    problem = of("gaussian-2", n=1)
    for structure in ONE_PASS:
        assert fit(problem, structure)(problem.x).variance.isfinite().all()
        many = laplace(data=(X[:1].expand(12, 2), Y[:1].expand(12, 2)), structure=structure)
        assert many(X).variance.isfinite().all() and many.log_evidence().isfinite()


def test_data_without_any_target_leave_the_prior():
    posterior = laplace(data=(X, torch.full_like(Y, NAN)))
    close(posterior.weight_variance(), torch.ones(22, dtype=D))
    assert posterior.log_likelihood() == 0

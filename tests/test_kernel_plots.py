"""Figures of a network as a Gaussian process: what is drawn is what was given, in the order of classes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from bayesgn import kernel_plots, models
from bayesgn.models.jacobian_kernel import JacobianKernel
from tests.models.problems import inputs, mlp

Y = torch.tensor([2, 0, 1, 0, 2, 1, 0])
ORDER = [1, 3, 6, 2, 5, 0, 4]


def drawn(ax) -> torch.Tensor:
    return torch.as_tensor(ax.images[0].get_array().copy())


def labels(axis) -> list[str]:
    return [text.get_text() for text in axis]


def test_a_kernel_is_sorted_by_class():
    kernel, x = JacobianKernel(models.Network(mlp(1))), inputs(7)
    K = kernel(x).to_dense().detach()
    for given in (K, kernel(x)):
        ax = kernel_plots.kernel_matrix(given, Y, names=("a", "b", "c"))
        torch.testing.assert_close(drawn(ax), K[ORDER][:, ORDER])
        assert labels(ax.get_xticklabels()) == labels(ax.get_yticklabels()) == ["a", "b", "c"]
        assert ax.get_xticks().tolist() == [1.0, 3.5, 5.5]  # three of the first class stand at 0, 1, 2
    torch.testing.assert_close(drawn(kernel_plots.kernel_matrix(K)), K)


def test_of_several_outputs_the_sum_of_kernels_is_drawn():
    K = JacobianKernel(models.Network(mlp(3)))(inputs(7)).to_dense().detach()
    ax = kernel_plots.kernel_matrix(K, outputs=3)
    torch.testing.assert_close(drawn(ax), sum(K[j::3, j::3] for j in range(3)))


def test_colours_end_where_most_of_the_kernel_does():
    K = torch.eye(20).double() * 100 + 1
    assert kernel_plots.kernel_matrix(K, quantile=0.9).images[0].get_clim() == (0.0, 1.0)
    assert kernel_plots.kernel_matrix(-K, quantile=0.9).images[0].get_clim() == (-1.0, 1.0)
    assert kernel_plots.kernel_matrix(0 * K).images[0].get_clim() == (0.0, 1.0)


def test_an_image_of_means_and_one_of_deviations():
    values = inputs(7, 3)
    ax = kernel_plots.gp_image(values, Y, outputs=("x", "y", "z"))
    torch.testing.assert_close(drawn(ax), values[ORDER].T)
    assert labels(ax.get_yticklabels()) == ["x", "y", "z"] and ax.images[0].get_cmap().name == "RdBu"
    assert kernel_plots.gp_image(values.exp()).images[0].get_cmap().name == "cividis"


def test_bars_of_two_standard_deviations():
    f = torch.distributions.MultivariateNormal(torch.arange(7.0), torch.diag(torch.arange(1.0, 8.0)))
    ax = kernel_plots.gp_bars(f, Y)
    segments = [s for c in ax.collections for s in c.get_segments()]
    assert [round((float(s[0][1]) + float(s[1][1])) / 2, 5) for s in segments] == ORDER  # within a class by mean, which is the index here
    for s, i in zip(segments, ORDER):
        assert float(s[1][1] - s[0][1]) == pytest.approx(4 * (i + 1) ** 0.5, rel=1e-5)
    assert len(kernel_plots.gp_bars(f).collections) == 1


def test_figures_are_files_and_leave_nothing_open(tmp_path):
    _, ax = plt.subplots()
    assert kernel_plots.gp_image(inputs(7, 2), ax=ax) is ax
    plt.close("all")
    kernel_plots.kernel_matrix(torch.eye(7), Y).figure.savefig(tmp_path / "k.png")
    assert (tmp_path / "k.png").stat().st_size > 0 and not plt.get_fignums()


def test_shapes_that_do_not_fit():
    f = torch.distributions.Normal(torch.zeros(7, 2), torch.ones(7, 2))
    for call, message in (
        (lambda: kernel_plots.kernel_matrix(torch.ones(3, 2)), "square matrix"),
        (lambda: kernel_plots.kernel_matrix(torch.ones(4, 4), outputs=3), "outputs = 3"),
        (lambda: kernel_plots.kernel_matrix(torch.ones(4, 4), Y), "7 classes for 4 data"),
        (lambda: kernel_plots.kernel_matrix(torch.ones(7, 7), Y, names=("a",)), "1 names for 3 classes"),
        (lambda: kernel_plots.gp_image(torch.ones(7)), "see gp_bars"),
        (lambda: kernel_plots.gp_image(torch.ones(7, 2), outputs=("a",)), "1 names for 2 outputs"),
        (lambda: kernel_plots.gp_bars(f), "gp_image draws several"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

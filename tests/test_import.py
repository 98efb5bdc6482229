"""`import bayesgn` is quick, silent and lazy, and the front door gives the function where a module has the same name."""

from __future__ import annotations

import subprocess
import sys

import pytest

import bayesgn
from bayesgn._extras import quiet_import, require


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_lazy_silent_and_quick():
    heavy = "{'torch', 'gpytorch', 'pyro', 'matplotlib', 'torchmetrics', 'backpack', 'sklearn'}"
    code = f"import sys, time; t = time.perf_counter(); import bayesgn; t = time.perf_counter() - t; print(t, {heavy} & set(sys.modules))"
    seconds, _, loaded = run(code).strip().partition(" ")
    assert loaded == "set()" and float(seconds) < 1


@pytest.mark.parametrize("name", bayesgn.__all__)
def test_every_public_name_is_reached(name):
    assert getattr(bayesgn, name) is not None
    assert name in dir(bayesgn)


def test_type_checkers_and_users_see_the_same_names():
    assert sorted([*bayesgn._VERBS, *bayesgn._ROOMS]) == bayesgn.__all__ == sorted(bayesgn.__all__)


def test_the_front_door_gives_the_function_not_its_module():
    # Also after the submodule of the same name was imported, in either order, in a fresh interpreter.
    code = "import bayesgn.inference.laplace, bayesgn, inspect; print(inspect.isfunction(bayesgn.laplace), inspect.isfunction(bayesgn.compare))"
    assert run(code).split() == ["True", "True"]
    code = "import bayesgn, inspect; bayesgn.laplace; import bayesgn.inference.laplace; print(inspect.isfunction(bayesgn.laplace))"
    assert run(code).split() == ["True"]


def test_importing_the_public_names_warns_of_nothing():
    run("import bayesgn; print([getattr(bayesgn, name) for name in bayesgn.__all__])")


def test_a_missing_name_says_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'laplacian'; it has bayes_newton, compare"):
        getattr(bayesgn, "laplacian")  # noqa: B009
    assert not hasattr(bayesgn, "laplacian")


def test_a_missing_module_of_ours_is_an_attribute_error(monkeypatch):
    monkeypatch.setitem(bayesgn._VERBS, "later", "bayesgn.inference.later_perhaps")
    with pytest.raises(AttributeError, match="'later': bayesgn.inference.later_perhaps is not part of this installation"):
        getattr(bayesgn, "later")  # noqa: B009


def test_require_names_the_extra():
    with pytest.raises(ImportError, match=r"bayesgn\[demo\]"):
        require("no_such_package", "demo")


def test_quiet_import_silences_one_warning_only():
    import warnings

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_import():
            warnings.warn("`torch.jit.script` is deprecated. Please switch.", FutureWarning, stacklevel=1)
            warnings.warn("another thing is deprecated", FutureWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["another thing is deprecated"]

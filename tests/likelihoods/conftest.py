"""A test that asks for `family` runs once for every family, unless it chooses its own."""

from .families import FAMILIES


def pytest_generate_tests(metafunc):
    chosen = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("family", FAMILIES, ids=lambda family: family.name)

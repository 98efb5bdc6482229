"""Making the compiled engine: where it is kept, what happens where it cannot be made, and several processes at once."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

from bayesgn import _kalman
from bayesgn._kalman import build, scan
from tests.kalman.chains import DOUBLE, first_row, gradients, make

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def forget():
    for function in (build.library, build.compiler, build._temporary):
        function.cache_clear()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process, with a cache folder of its own."""
    monkeypatch.setenv("BAYESGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))  # quick to compile
    forget()
    yield tmp_path / "cache"
    forget()


def use(monkeypatch, command: str) -> None:
    monkeypatch.setenv("CXX", command)
    forget()


def small():
    return make(7, 1, 1, H=torch.ones(1, 1, dtype=DOUBLE))


def agrees(result) -> bool:
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(result, scan.smooth(*small())))


@needs_compiler
def test_the_library_is_kept_in_the_cache_folder(fresh):
    assert agrees(_kalman.smooth(*small()))
    (kept,) = fresh.iterdir()
    assert kept.name.startswith("kalman-1-1-")
    before = kept.stat().st_mtime_ns
    forget()
    assert agrees(_kalman.smooth(*small()))
    assert [p.stat().st_mtime_ns for p in fresh.iterdir()] == [before]  # found again, not made again


@pytest.mark.parametrize("command", ["no-such-compiler", "false"])
def test_without_a_working_compiler_the_scan_serves_and_says_so(fresh, monkeypatch, command):
    use(monkeypatch, command)
    if command == "false" and shutil.which("false") is None:
        pytest.skip("no `false` here")
    p = small()
    expected = "no C\\+\\+ compiler" if command != "false" else "could not make the compiled filter"
    with pytest.warns(UserWarning, match=expected):
        got = _kalman.smooth(*p)
    assert all(torch.equal(a, b) for a, b in zip(got, scan.smooth(*p)))
    assert all(torch.equal(a, b) for a, b in zip(_kalman.states(*p), scan.states(*p)))  # and does not say it twice
    assert not fresh.exists() or not list(fresh.iterdir())


@needs_compiler
def test_the_compilers_own_words_are_passed_on(fresh, monkeypatch):
    use(monkeypatch, f"{build.compiler()[0]} -DONES=unheard_of")
    with pytest.warns(UserWarning, match="unheard_of"):
        assert build.library(1, 1) is None


@needs_compiler
def test_a_folder_that_cannot_be_written_to(fresh, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BAYESGN_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING, "bayesgn.kalman"):
        assert agrees(_kalman.smooth(*small()))
    assert "cannot be kept in" in caplog.text
    folder = build._temporary()
    assert list(folder.glob("kalman-1-1-*"))
    shutil.rmtree(folder)


@needs_compiler
def test_a_broken_library_is_made_anew(fresh, caplog):
    fresh.mkdir()
    (fresh / "kalman-broken.so").write_text("no library at all")
    command = [*build.compiler(), *build.FLAGS, "-DD=1", "-DC=1"]
    with caplog.at_level(logging.WARNING, "bayesgn.kalman"):
        assert build._opened(fresh, "kalman-broken.so", command).smooth
    assert "does not load" in caplog.text


@needs_compiler
def test_a_compiler_that_does_not_know_march_native(fresh, monkeypatch, tmp_path):
    wrapper = tmp_path / "plain-c++"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *-march=native*) echo no >> {tmp_path}/said; exit 1;; esac\nexec {build.compiler()[0]} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    use(monkeypatch, str(wrapper))
    assert agrees(_kalman.smooth(*small()))
    assert (tmp_path / "said").read_text() == "no\n"  # it was asked, and once
    assert [p.name[:11] for p in fresh.iterdir()] == ["kalman-1-1-"]


@needs_compiler
def test_an_interrupted_compilation_leaves_nothing(fresh, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.library(1, 1)
    assert list(fresh.iterdir()) == []


@needs_compiler
def test_litter_of_killed_processes_is_cleared(fresh):
    fresh.mkdir()
    old, young = fresh / "building-old.so", fresh / "building-young.so"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 2 * build.ABANDONED,) * 2)
    build.library(1, 1)
    assert not old.exists() and young.exists()


@needs_compiler
def test_two_processes_at_once(fresh):
    code = (
        "from bayesgn._kalman import build; build.FLAGS = ('-O0', *build.FLAGS[1:]); "
        "lib = build.library(1, 1); assert lib is not None and lib.smooth"
    )
    children = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=200)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert [p.name[:11] for p in fresh.iterdir()] == ["kalman-1-1-"]


@needs_compiler
def test_threads_do_not_share_their_workspace():
    problems = [make(400 + 50 * i, kinds=3, H=first_row(3), seed=i) for i in range(4)]
    want = [_kalman.smooth(*p) for p in problems]
    wrong = []

    def work(i: int) -> None:
        for _ in range(200):
            got = _kalman.smooth(*problems[i])
            if not all(torch.equal(a, b) for a, b in zip(got, want[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@needs_compiler
def test_the_log_says_which_engine_runs(caplog):
    _kalman.chain._report.cache_clear()
    with caplog.at_level(logging.INFO, "bayesgn.kalman"):
        _kalman.smooth(*make(3, H=first_row(3)))
        _kalman.smooth(*make(3, H=first_row(3)).to(torch.float32))
    assert "run on the compiled filter" in caplog.text and "run on the torch scan" in caplog.text


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("d, c", [(12, 4), (24, 8), (40, 10)])
def test_large_chains_compile_in_reasonable_time_and_spare_the_stack(d, c, monkeypatch, tmp_path):
    monkeypatch.setenv("BAYESGN_CACHE", str(tmp_path))
    forget()
    before = os.times().children_user
    p = make(4, d, c)
    found = []

    def work() -> None:
        found.extend((*_kalman.smooth(*p), *gradients(lambda q: _kalman.smooth(*q), p, [1.0, 1.0, 1.0])))

    size = threading.stack_size(512 * 1024)  # what other systems give a thread: large matrices must not lie there
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
    assert os.times().children_user - before < 15  # 2 to 4 s of the compiler's own time on a quiet machine
    expected = (*scan.smooth(*p), *gradients(lambda q: scan.smooth(*q), p, [1.0, 1.0, 1.0]))
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) < 1e-8 * float(b.abs().max())
    forget()

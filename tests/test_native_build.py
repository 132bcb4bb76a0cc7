"""Where the compiled ops are kept, and what happens where they cannot be or are damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_paged.kernels import native_build
from hf_paged.kernels.native import native_ops, native_status

needs_compiler = pytest.mark.skipif(native_ops() is None, reason="no C compiler: nothing is compiled")


@pytest.fixture
def made(monkeypatch, tmp_path):
    """What is compiled, instead of compiling it; temporary files go to `tmp_path`."""
    targets = []
    monkeypatch.setattr(native_build, "_build", lambda compiler, target: targets.append(target))
    monkeypatch.setattr(native_build.tempfile, "gettempdir", lambda: str(tmp_path))
    return targets


@needs_compiler
@pytest.mark.parametrize("size", [0, 5000, -1])
def test_a_library_that_was_cut_short_is_made_anew(made, monkeypatch, tmp_path, size):
    compiler = native_build.compiler_of(dict(os.environ))
    whole = native_build.built(compiler)
    assert not made  # it is there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = tmp_path / "cache" / "hf_paged" / whole.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(whole.read_bytes())
    assert native_build.built(compiler) == kept and not made
    kept.write_bytes(whole.read_bytes()[:size])
    assert native_build.built(compiler) == kept and made == [kept]


@needs_compiler
def test_without_a_home_it_is_kept_among_temporary_files(made, monkeypatch, tmp_path):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    path = native_build.built(native_build.compiler_of(dict(os.environ)))
    assert made == [path] and path.parent == tmp_path / f"hf_paged-{os.getuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_a_cache_that_cannot_be_written_is_read(made, monkeypatch, tmp_path):
    compiler = native_build.compiler_of(dict(os.environ))
    whole = native_build.built(compiler)
    monkeypatch.setattr(native_build.os, "access", lambda path, mode: False)
    assert native_build.built(compiler) == whole and not made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = native_build.built(compiler)
    assert made == [path] and path.parent == tmp_path / f"hf_paged-{os.getuid()}"


def test_no_library_is_taken_from_a_folder_to_which_others_write(made, tmp_path):
    folder = tmp_path / f"hf_paged-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert native_build._own_folder() is None
    folder.chmod(0o700)
    assert native_build._own_folder() == folder


def test_a_compiler_of_several_words():
    assert native_build.compiler_of({"CC": "ccache 'my gcc' -m64"}) == ["ccache", "my gcc", "-m64"]


@pytest.mark.parametrize("given", ["/bin/false", "no-such-compiler", "'unbalanced", "/bin/true"])
def test_a_compiler_that_fails_leaves_the_torch_ops(monkeypatch, tmp_path, given):
    monkeypatch.setenv("CC", given)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ops, why = native_status.__wrapped__()
    assert ops is None and "failed" in why
    assert not list(tmp_path.rglob("*.so"))

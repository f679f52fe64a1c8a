"""The cache of kernels: where it is, whose it is, what is in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tomexport.errors import BuildError
from tomexport.kernels import build, cache


def _library() -> Path:
    return build.library("onnxruntime", "1.2.3")


def test_where_it_is(monkeypatch, tmp_path):
    for name in ("TOMEXPORT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home/.cache/tomexport"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg/tomexport"
    monkeypatch.setenv("TOMEXPORT_CACHE", "~/own")
    assert cache.folder() == tmp_path / "home/own"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOMEXPORT_CACHE", "here")
    assert cache.folder() == tmp_path / "here"
    assert list(tmp_path.iterdir()) == []


def test_without_a_home(monkeypatch):
    def nowhere(path):
        raise RuntimeError

    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(BuildError, match="There is no home folder for a cache"):
        cache.folder()


def test_it_is_the_users_alone(stand_in):
    path = _library()
    for made in (stand_in.cache, path.parent, path):
        assert made.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_cache_that_others_can_write_to_is_refused(stand_in, mode):
    path = _library()
    stand_in.cache.chmod(mode)
    for call in (_library, cache.stored, cache.clean):
        with pytest.raises(BuildError, match=r"is not yours alone.*Set TOMEXPORT_CACHE"):
            call()
    assert path.exists()


def test_a_cache_that_others_can_read_is_not(stand_in):
    path = _library()
    stand_in.cache.chmod(0o755)
    assert _library() == path


def test_a_cache_of_another_user_is_refused(stand_in, monkeypatch):
    stand_in.cache.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(BuildError, match="others could put code there"):
        _library()
    assert stand_in.builds() == []


@pytest.mark.parametrize("planted", ["library", "folder"])
def test_what_others_could_have_planted_is_refused(stand_in, planted):
    path = _library()
    (path if planted == "library" else path.parent).chmod(0o777)
    with pytest.raises(BuildError, match="is not yours alone"):
        _library()


def test_a_cache_that_cannot_be_written(stand_in, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOMEXPORT_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(BuildError, match=r"kernels could not be written in .*: Not a directory"):
        _library()


def test_a_full_disk_leaves_nothing(stand_in, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "sync", full)
        with pytest.raises(BuildError, match="No space left on device"):
            _library()
    assert cache.stored() == ()
    assert stand_in.leftovers() == []
    assert _library().exists()


def test_clean_removes_what_is_ours(stand_in):
    assert cache.clean() == (0, 0)
    assert not stand_in.cache.exists()
    paths = [_library(), build.library("openvino", "1")]
    other = stand_in.cache / "other"
    other.mkdir()
    (other / "file").write_text("precious")
    sizes = sum(file.stat().st_size for path in paths for file in path.parent.iterdir())
    assert cache.clean() == (2, sizes)
    assert cache.stored() == ()
    assert [path.name for path in stand_in.cache.iterdir() if path.is_dir()] == ["other"]
    assert (other / "file").read_text() == "precious"
    assert cache.clean() == (0, 0)


def test_a_failure_leaves_the_library_that_works(stand_in, monkeypatch):
    path = _library()
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(BuildError, match="It is broken, they say") as caught:
        build.build(build.Target("onnxruntime", "1.2.3"))
    log = path.parent / cache.LOG
    assert str(log) in str(caught.value)
    assert "It is broken" in log.read_text()
    assert _library() == path
    assert path.read_text() == "a library"
    assert stand_in.leftovers() == []

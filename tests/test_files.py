"""Files are there in full or not at all, under their own names, and nothing without an end is read."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchnorm import files
from batchnorm.errors import DataError, FileError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"first", b"second, which is longer", b""):
        files.write_whole(path, content)
        assert files.read_within(path) == content
    files.write_whole(path, "µ")
    assert path.read_bytes() == "µ".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    files.write_whole(ours, b"")
    other.write_bytes(b"")
    assert ours.stat().st_mode == other.stat().st_mode


def test_a_full_disk_leaves_the_earlier_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    files.write_whole(path, b"earlier")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"a cannot be written: No space left on device"):
        files.write_whole(path, b"later")
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_many_who_write_one_file_leave_that_of_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(len(contents)) as pool:
        for _ in range(20):
            list(pool.map(lambda content: files.write_whole(path, content), contents))
            assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    for name in ("a", "a.tmp", ".a.tmp", f"a.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(precious)
    files.write_whole(tmp_path / "a", b"ours")
    assert precious.read_bytes() == b"mine"
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("act", [lambda path: files.write_whole(path, b""), files.check_writable])
def test_a_place_where_no_file_can_be_is_named(tmp_path: Path, act: object) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert callable(act)
    with pytest.raises(FileError, match="cannot be written: embedded null byte"):
        act(tmp_path / "a\0b")
    with pytest.raises(FileError, match=r"there is no folder .*nowhere"):
        act(tmp_path / "nowhere" / "a")
    with pytest.raises(FileError, match="a cannot be written: Not a directory"):
        act(tmp_path / "file" / "a")
    with pytest.raises(FileError, match="cannot be written"):
        act(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_can_be_written_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.check_writable(path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"earlier")
    files.check_writable(path)
    assert path.read_bytes() == b"earlier"


def test_a_name_of_many_bytes_is_written(tmp_path: Path) -> None:
    files.write_whole(tmp_path / ("語" * 80), b"")
    assert len(list(tmp_path.iterdir())) == 1


def test_no_device_and_no_pipe_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/null")):
        with pytest.raises(FileError, match=rf"{path} cannot be written: it is no regular file"):
            files.check_writable(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(FileError, match=rf"{path} cannot be read: (it is no reg|Is a dir)"):
            files.read_within(path)
    with pytest.raises(FileNotFoundError):
        files.read_within(tmp_path / "nothing")
    (tmp_path / "long").write_bytes(b"12345")
    assert files.read_within(tmp_path / "long", 5) == b"12345"
    with pytest.raises(DataError, match="long has 5 bytes, where at most 4 can be right"):
        files.read_within(tmp_path / "long", 4)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read any file")
    with pytest.raises(FileError, match="secret cannot be read: Permission denied"):
        files.read_within(path)

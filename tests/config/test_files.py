"""Folders are replaced whole, and only by their own kind."""

from pathlib import Path

import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import (
    check_not_read,
    check_replaceable,
    replace_folder,
    temporary_name,
)


def make(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("older", [None, {}, {"marker": "old", "more": "x"}])
def test_a_folder_is_replaced_whole(tmp_path: Path, older: dict[str, str] | None) -> None:
    path = tmp_path / "model"
    if older is not None:
        make(path, **older)
    make(tmp_path / ".model.old", stale="x")
    new = make(temporary_name(path), marker="new")
    make(new / "inner", file="x")
    replace_folder(new, path, marker="marker")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    assert (path / "marker").read_text() == "new"
    assert sorted(each.name for each in path.iterdir()) == ["inner", "marker"]


def test_other_folders_files_and_links_stay(tmp_path: Path) -> None:
    precious = make(tmp_path / "precious", thesis="x")
    (tmp_path / "link").symlink_to(make(tmp_path / "model", marker="x"))
    new = make(tmp_path / "new", marker="x")
    for path, message in [
        (precious, "has files but no marker"),
        (precious / "thesis", "is a link or a file"),
        (tmp_path / "link", "is a link or a file"),
        (Path("."), "a name of its own"),
    ]:
        with pytest.raises(UsageError, match=message):
            check_replaceable(path, "marker")
        with pytest.raises(UsageError, match=message):
            replace_folder(new, path, marker="marker")
    assert (precious / "thesis").read_text() == "x"
    assert new.is_dir()
    check_replaceable(tmp_path / "absent", "marker")


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    source = make(tmp_path / "source", file="x")
    check_not_read(tmp_path / "other", source, source / "file")
    check_not_read(source / "inner", source)
    (tmp_path / "link").symlink_to(source)
    for output, read in [
        (source, source),
        (source, source / "file"),
        (tmp_path, source),
        (tmp_path / "x" / ".." / "source", source),
        (source, tmp_path / "link"),
    ]:
        with pytest.raises(UsageError, match=r"would replace .*, which is read: name another"):
            check_not_read(output, tmp_path / "other", read)

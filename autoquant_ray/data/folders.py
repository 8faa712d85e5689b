"""Folders of data files, and data sets that ``datasets`` opens: folders that it saved, hub ids.

``datasets`` says which files of a folder belong to a split. It would then read those of the
commonest kind alone, and infer types: here all are read, each as what it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from autoquant_ray.data.files import lists_in, read_file
from autoquant_ray.data.kinds import kind_of
from autoquant_ray.data.rows import Row, RowReader
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.errors import DataError, one_line
from autoquant_ray.wording import few

logger = logging.getLogger(__name__)

_SAVED = ("state.json", "dataset_dict.json")
_INFOS = ("dataset_info.json", "dataset_infos.json")
_CARDS = ("README.md", ".huggingface.yaml")
_DESCRIPTIONS = tuple(f"metadata{ending}" for ending in (".csv", ".jsonl", ".parquet"))
_ASIDE = (".md", ".rst", ".yaml", ".yml", ".lock", ".sha256", ".md5", ".py", ".ipynb", ".pdf")
_GO_WITH_DATA = re.compile(r"(readme|licen[sc]e|notice|citation)([-._].*)?", re.IGNORECASE)
_MARKS = ("*", "?", "[", "::")
_NUM_NAMED = 3
_MOST_OF_ERROR = 120  # characters
_FAILURES = (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError)


def read_folder(path: Path, spec: DataSpec) -> Iterator[Row]:
    """The rows of a folder's files of the split, file after file.

    Raises:
        DataError: There is no file of a known kind, or one of an unknown kind among them; while
            iterating, a file cannot be read.
    """
    files = None if any((path / name).is_file() for name in _SAVED) else _files(path, spec)
    if files is None:
        return read_dataset(path, spec)
    kinds = {file: spec.read_as or kind_of(file) for file in files}
    unread = [file for file, kind in kinds.items() if kind is None]
    if unread and (len(unread) == len(files) or _describes(files)):
        return read_dataset(path, spec)
    _require_known(path, unread)
    readable = [(file, kind) for file, kind in kinds.items() if kind is not None]
    counts = {kind: sum(other == kind for _, other in readable) for _, kind in readable}
    if len(counts) > 1:
        shown = ", ".join(f"{count} of {kind}" for kind, count in sorted(counts.items()))
        logger.info("%s: split %s is read from files of several kinds: %s", path, spec.split, shown)
    return (
        row
        for file, kind in readable
        for row in read_file(file, kind, RowReader(spec, place=file, folder=path))
    )


def read_dataset(path: Path, spec: DataSpec) -> Iterator[Row]:
    """The rows of what ``datasets`` opens.

    Raises:
        DataError: It does not, or a column is missing; while iterating, it cannot be read.
    """
    import datasets

    rows = RowReader(spec)
    try:
        dataset = _open_dataset(path, spec)
        if dataset.column_names is not None:
            features = dataset.features or datasets.Features()
            lists = lists_in(features.arrow_schema)
            columns = rows.columns(dataset.column_names, lists=lists)
            dataset = dataset.select_columns(columns)
            for name in columns:
                if isinstance(features.get(name), datasets.Image):
                    dataset = dataset.cast_column(name, datasets.Image(decode=False))
    except ConnectionError as error:
        raise DataError(
            f"data source {spec.source} is neither a file nor a folder here, and no hub gives it "
            f"({one_line(error, _MOST_OF_ERROR)}); give a file or a folder, or download it where "
            "there is a network: hf download --repo-type dataset"
        ) from None
    except (*_FAILURES, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data source {spec.source} cannot be loaded as a dataset folder or hub id: "
            f"{one_line(error)}"
        ) from None

    def read() -> Iterator[Row]:
        try:
            for number, row in enumerate(dataset, start=1):
                yield rows.read(row, f"row {number}", is_table=True)
        except (*_FAILURES, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"data source {spec.source}: {one_line(error)}") from None

    return read()


def _open_dataset(path: Path, spec: DataSpec) -> Any:
    import datasets

    if (path / "state.json").is_file():
        return datasets.load_from_disk(path)
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(path)
        if spec.split not in splits:
            raise ValueError(f"it has no split {spec.split!r}; splits: {', '.join(splits)}")
        return splits[spec.split]
    name = str(path) if path.is_dir() else spec.source
    return datasets.load_dataset(name, split=spec.split, streaming=True)


def _files(path: Path, spec: DataSpec) -> list[Path] | None:
    """Files of a split of a folder, in the order of ``datasets``; None where it decides itself.

    Raises:
        DataError: There is no such split, or no file of it holds data.
    """
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    base, split = path.resolve().as_posix(), spec.split
    if any(mark in base for mark in _MARKS):
        raise DataError(
            f"data source {path}: a folder's path with * ? [ or :: is a pattern to `datasets`, "
            "which may match other folders; rename it, or give its files"
        )
    _require_ends_of_links(path)
    resolved: Any
    try:
        if _card_names_files(path):
            resolved = datasets.load_dataset_builder(str(path)).config.data_files or {}
        else:
            resolved = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except (*_FAILURES, datasets.exceptions.DatasetsError):
        return None  # ``datasets`` says why
    if not resolved:
        return None
    if split not in resolved:
        splits = ", ".join(map(str, resolved))
        raise DataError(
            f"data source {path} has no split {split!r}; splits, by the names of its files: "
            f"{splits}; name one with `split`, or give its files"
        )
    _tell_left_out(path, {Path(file) for files in resolved.values() for file in files})
    files = [Path(file) for file in resolved[split]]
    aside = [file for file in files if _is_aside(file, is_data=spec.read_as is not None)]
    names = few([str(file.relative_to(base)) for file in aside], _NUM_NAMED)
    if aside and len(aside) == len(files):
        raise DataError(
            f"data source {path} holds no data, but empty files, or documents, which are read "
            f"with `read_as` text: {names}"
        )
    if aside:
        logger.info("%s: left aside as no data: %s", path, names)
    return [file for file in files if file not in set(aside)]


def _tell_left_out(path: Path, files: Collection[Path]) -> None:
    """Tell which files of data belong to no split, since the names of others say one, and why else
    a file may not be read: it is in a folder that is a link, which ``datasets`` does not follow.
    """
    base = path.resolve()
    present = [file for file in sorted(base.rglob("*")) if _is_plain(file.relative_to(base))]
    linked = [file for file in present if file.is_symlink() and file.is_dir()]
    left_out = [f for f in present if _is_data(f) and f not in files]
    for unread, why in ((left_out, "belong to no split"), (linked, "are links to folders")):
        if unread:
            names = few([str(file.relative_to(base)) for file in unread], _NUM_NAMED)
            logger.warning("%s: not read, as they %s: %s", path, why, names)


def _require_ends_of_links(path: Path) -> None:
    """Refuse links to files that are not there, as of a download that was cut short: ``datasets``
    passes them by.

    Raises:
        DataError: There are such links with the ending of data.
    """
    base = path.resolve()
    links = (file for file in sorted(base.rglob("*")) if file.is_symlink() and not file.exists())
    names = [str(file.relative_to(base)) for file in links if kind_of(file) is not None]
    names = [name for name in names if _is_plain(Path(name))]
    if names:
        raise DataError(
            f"data source {path} has links to files that are not there: {few(names, _NUM_NAMED)}; "
            "get these files, or take the links out"
        )


def _is_data(file: Path) -> bool:
    is_of_kind = kind_of(file) is not None and file.is_file() and file.name not in _INFOS
    return is_of_kind and not _is_aside(file, is_data=False)


def _is_plain(file: Path) -> bool:
    """Whether no part of a path is hidden or a tool's, as ``datasets`` sees it."""
    return not any(part.startswith((".", "__")) for part in file.parts)


def _card_names_files(path: Path) -> bool:
    """Whether the folder's card says which files belong to which split."""
    return any(
        "data_files:" in (path / name).read_text(encoding="utf-8", errors="replace")
        for name in _CARDS
        if (path / name).is_file()
    )


def _is_aside(file: Path, *, is_data: bool) -> bool:
    """Whether a file goes with data and is none; empty ones mark that a tool is done.

    Args:
        file: Of the folder.
        is_data: Whether the user says what the files hold, whatever their endings.
    """
    if file.stat().st_size == 0:
        return True
    if kind_of(file) not in (None, "text"):  # citations.jsonl
        return False
    is_document = not is_data and file.suffix.lower() in _ASIDE
    return is_document or _GO_WITH_DATA.fullmatch(file.name) is not None


def _is_media(file: Path) -> bool:
    import mimetypes

    kind, _ = mimetypes.guess_type(file.name)
    return kind is not None and kind.startswith(("image/", "audio/", "video/"))


def _describes(files: Sequence[Path]) -> bool:
    """Whether the files are media with a table that describes each, which ``datasets`` joins."""
    return any(file.name in _DESCRIPTIONS for file in files) and any(map(_is_media, files))


def _require_known(path: Path, unread: Sequence[Path]) -> None:
    """Refuse files that hold something that cannot be read; images beside chats are read by name.

    Raises:
        DataError: There are such files.
    """
    names = [str(file.relative_to(path.resolve())) for file in unread if not _is_media(file)]
    if names:
        raise DataError(
            f"data source {path} has files of no known kind beside others: "
            f"{few(names, _NUM_NAMED)}; take them out, give the files of data alone, or "
            "say what all files hold with `read_as`"
        )

"""The folder of an export: written beside its place, renamed at the end, with the modes of a file
that a person makes; and the packed parts that it is put together from.

Every part is written under a temporary name and renamed, so that what is there is whole: an export
that was killed goes on from the parts that it finds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ConfigError, StoreError, StoreLostError, one_line
from autoquant_ray.models.stored_tensors import INDEX
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.filesystems import disk_problem
from autoquant_ray.runs.names import RUN_FILE

if TYPE_CHECKING:
    import torch

_MOST_OF_NAME = 80
_FILLED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
"""Why a folder does not take another's place: that holds something, or is a file."""
_PATTERN = "model{suffix}.safetensors"
_ORDER, _FACTS = "order", "facts"


def require_outside_runs(path: Path, given: str, option: str = "out") -> None:
    """Check that something is not written into a run directory, which a new scan would clear.

    Args:
        path: What is to be written.
        given: As it was given, for the error.
        option: Which option it is.

    Raises:
        ConfigError: A folder above it, or itself, is a run.
    """
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if not (folder / RUN_FILE).is_file():
            continue
        with suppress(StoreError):
            RunDirectory(str(folder)).require_run()
            raise ConfigError(
                f"`{option}` {given} is inside the run {folder}, which holds its own files only; "
                "give a folder outside of it"
            )


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A temporary folder that takes its place when the context ends well, else goes.

    What killed exports to the same place have left is removed first: a living one holds a lock on
    its folder.

    Args:
        target: A new or empty folder.

    Raises:
        StoreError: It cannot be written.
        StoreLostError: The disk is full or fails.
        ConfigError: At the end, something is there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent, _prefix(target))
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    except OSError as error:
        if (lost := disk_problem(error, target)) is not None:
            raise StoreLostError(f"{lost}, then start again") from None
        raise StoreError(f"`out` {target} cannot be written: {one_line(error)}") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        _open_up(folder)
        _take_place(folder, target)
    except Exception as error:
        if (lost := disk_problem(error, target)) is not None:
            raise StoreLostError(f"{lost}, then start again") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _take_place(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in _FILLED:
            raise
        raise ConfigError(
            f"`out` {target} was filled by another process; give another folder"
        ) from None


@contextmanager
def parts_beside(target: Path, fingerprint: str) -> Iterator[Path]:
    """A folder for finished parts of an export, which the next one finds where this one is killed.

    Parts that other exports to the same place have left are removed.

    Args:
        target: As above.
        fingerprint: Of all that decides about the content of the parts.

    Raises:
        ConfigError: Another process is writing the same.
        OSError: It cannot be written.
    """
    prefix = f".{target.name[:_MOST_OF_NAME]}.parts-"
    folder = target.parent / f"{prefix}{fingerprint}"
    _remove_leftovers(target.parent, prefix, but=folder.name)
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"`out` {target} is being written by another process; wait for it, or give another "
            "folder"
        ) from None
    try:
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name[:_MOST_OF_NAME]}.exporting-"


def _remove_leftovers(parent: Path, prefix: str, but: str = "") -> None:
    for path in parent.iterdir():
        if not path.name.startswith(prefix) or path.name == but or not path.is_dir():
            continue
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue  # of an export that is at work
        finally:
            os.close(lock)


def _open_up(folder: Path) -> None:
    """Give files and folders the modes of new ones; writers of weights make them private."""
    umask = os.umask(0)
    os.umask(umask)
    for place, _, files in os.walk(folder):
        os.chmod(place, 0o777 & ~umask)
        for name in files:
            os.chmod(os.path.join(place, name), 0o666 & ~umask)


def require_shard_size(max_shard_size: str) -> None:
    """Check the largest size of a file of weights.

    Raises:
        ConfigError: It is none.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", max_shard_size.strip(), re.IGNORECASE)
    if size is None or float(size[1]) == 0:
        raise ConfigError(
            f"`max_shard_size` {max_shard_size!r} is no size; give one such as 5GB or 500MB"
        )


class PartFiles:
    """Files of parts.

    Args:
        folder: Holds them; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, name: str) -> bool:
        """Whether a part was written."""
        return self._file(name).exists()

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Any) -> None:
        """Write a part.

        Args:
            name: Of the part.
            tensors: As the checkpoint holds them, in its order; no two share their memory.
            facts: What else is to be remembered, plain values.
        """
        from safetensors.torch import save_file

        metadata = {_ORDER: json.dumps(list(tensors)), _FACTS: json.dumps(facts)}
        unfinished = self._file(name).with_suffix(".part")
        save_file({n: t.contiguous() for n, t in tensors.items()}, unfinished, metadata=metadata)
        unfinished.rename(self._file(name))

    def facts(self, name: str) -> Any:
        """What was remembered with a part."""
        return json.loads(self._metadata(name)[_FACTS])

    def assemble(self, names: Sequence[str], out: Path, max_shard_size: str) -> None:
        """Put parts together: one file, or shards with an index.

        Nothing is read into memory that stays there: parts are mapped.

        Args:
            names: Of the parts, in the order of the checkpoint.
            out: Folder to write to.
            max_shard_size: As transformers' ``save_pretrained`` takes it; larger tensors get a file
                of their own.
        """
        from huggingface_hub import split_state_dict_into_shards_factory
        from safetensors.torch import save_file

        with self._opened(names) as tensors:
            sizes = {name: file.get_tensor(name).nbytes for name, file in tensors.items()}
            split = split_state_dict_into_shards_factory(
                sizes,
                get_storage_size=int,
                filename_pattern=_PATTERN,
                max_shard_size=max_shard_size,
            )
            for file_name, held in split.filename_to_tensors.items():
                shard = {name: tensors[name].get_tensor(name) for name in held}
                save_file(shard, out / file_name, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True)
            (out / INDEX).write_text(text + "\n")

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _metadata(self, name: str) -> dict[str, str]:
        from safetensors import safe_open

        with safe_open(self._file(name), framework="pt") as file:
            return dict(file.metadata())

    @contextmanager
    def _opened(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Tensor -> the open file of its part."""
        from safetensors import safe_open

        tensors: dict[str, Any] = {}
        with ExitStack() as stack:
            for name in names:
                file = stack.enter_context(safe_open(self._file(name), framework="pt"))
                tensors |= dict.fromkeys(json.loads(file.metadata()[_ORDER]), file)
            yield tensors

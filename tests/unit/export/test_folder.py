"""The folder of an export: its modes, leftovers of killed exports, a full disk, its place."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal, run
from safetensors.torch import save_file

from autoquant_ray.errors import ConfigError, StoreLostError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.export.folder import written_beside
from autoquant_ray.export.source import require_new_folder

CHOICE = {"*": "wfp8_afp8", "lm_head": "none"}


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of this process for a while."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(umask: int, solved_run: Any, tmp_path: Path) -> None:
    parent = tmp_path / "shared"
    parent.mkdir()
    parent.chmod(0o1777)
    directory, _, _ = solved_run("llama", CHOICE)
    export_run(directory, str(parent / "out"))
    modes = {p: p.stat().st_mode & 0o7777 for p in [parent / "out", *(parent / "out").rglob("*")]}
    assert any(path.suffix == ".safetensors" for path in modes)
    for path, mode in modes.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


KILLED = """
import os, signal, sys
from pathlib import Path
from autoquant_ray.export.folder import written_beside
from autoquant_ray.export.source import require_new_folder
with written_beside(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_export_left_goes_with_the_next_and_a_living_one_stays(
    tmp_path: Path,
) -> None:
    def start() -> tuple[subprocess.Popen[str], Path]:
        words = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    (killed, left), (living, at_work) = start(), start()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert left.exists()
    (tmp_path / ".out-notes").mkdir()
    with written_beside(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert not left.exists()
    assert (at_work / "weights").exists()
    living.kill()
    living.communicate()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out-notes", at_work.name, "out"]


def test_full_disk_is_an_error_with_path_space_and_remedy_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    """A process that may write few bytes to a file gets the same errors as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for write in (
            lambda folder: (folder / "file").write_bytes(b"x" * 100_000),
            lambda folder: save_file({"a": torch.zeros(100_000)}, folder / "a.safetensors"),
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
            with (
                pytest.raises(StoreLostError) as caught,
                written_beside(tmp_path / "out") as beside,
            ):
                write(beside)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            text = str(caught.value)
            assert text.startswith(f"cannot write {tmp_path / 'out'}: ")
            assert "MiB are free there" in text
            assert "start again" in text
            assert len(text) <= 400
            assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


def test_an_error_that_is_none_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written_beside(tmp_path / "out"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_out_inside_a_run_is_refused(solved_run: Any, tmp_path: Path) -> None:
    directory, _, _ = solved_run("llama", CHOICE)
    (tmp_path / "link").symlink_to(directory.uri)
    for out in (f"{directory.uri}/served", f"{directory.uri}/a/b", f"{tmp_path}/link/served"):
        with pytest.raises(ConfigError, match=r"is inside the run .* outside of it"):
            export_run(directory, out)
    recipe = f"{directory.uri}/recipe.json"
    words = ("export", directory.uri, "--format", "recipe", "--tool", "auto-round", "--out", recipe)
    assert "is inside the run" in refusal(run(*words))
    assert not Path(recipe).exists()
    assert not (Path(directory.uri) / "a").exists()


def test_links_to_a_folder_are_followed(solved_run: Any, tmp_path: Path) -> None:
    """No folder can be renamed to the place of a link."""
    directory, _, _ = solved_run("llama", CHOICE)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/empty").mkdir()
    (tmp_path / "link").symlink_to("disk/empty")
    (tmp_path / "dangling").symlink_to("disk/new")
    for link, place in (("link", "disk/empty"), ("dangling", "disk/new"), ("no/../up", "up")):
        written = export_run(directory, str(tmp_path / link))
        assert Path(written.path) == tmp_path / place
        assert (tmp_path / place / "config.json").exists()
    assert not (tmp_path / "no").exists()
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"empty", "new"}


def test_folders_whose_place_no_other_can_take_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        places = [Path(line.split()[1]) for line in mounts]
    mounted = [str(p) for p in places if p.is_dir() and not any(p.iterdir())][:1]
    for out in (".", "../work", str(tmp_path / "work"), *mounted):
        with pytest.raises(ConfigError, match=r"can take its place; give a new folder, in it"):
            require_new_folder(out)
    for out in (str(tmp_path / "loop"), "~nobody-of-that-name/x"):
        with pytest.raises(ConfigError, match=r"; give a new folder$"):
            require_new_folder(out)
    assert require_new_folder("inside") == tmp_path / "work/inside"


def test_recipe_that_cannot_be_written_leaves_nothing(solved_run: Any, tmp_path: Path) -> None:
    directory, _, _ = solved_run("llama", CHOICE)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = set(tmp_path.rglob("*"))
    words = ("export", directory.uri, "--format", "recipe", "--tool", "auto-round", "--overwrite")
    for out, line in (
        ("folder", "is a folder; give the name of a file"),
        ("folder/..", "is a folder; give the name of a file"),
        ("file/recipe.json", "; give another file"),
        ("x" * 254, "; give another file"),
    ):
        assert line in refusal(run(*words, "--out", tmp_path / out))
    for out in ("", "s3://bucket/recipe.json"):
        refusal(run(*words, "--out", out))
    assert "give a folder of its own" in refusal(
        run(*words, "--out", tmp_path / "a", "--base", tmp_path / "a")
    )
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("theirs", ["out/weights", "out"])
def test_place_that_another_has_filled_meanwhile_stays_as_it_is(
    theirs: str, tmp_path: Path
) -> None:
    """Two exports in different layouts do not wait for each other."""

    def export() -> None:
        with written_beside(tmp_path / "out") as folder:
            (folder / "ours").touch()
            (tmp_path / theirs).parent.mkdir(exist_ok=True)
            (tmp_path / theirs).touch()

    with pytest.raises(ConfigError, match=r"was filled by another process; give another folder"):
        export()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / theirs]

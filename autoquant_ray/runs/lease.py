"""A lock that a crashed holder cannot keep, on any store that a run directory can be on.

Every contender writes a claim of its own into a folder and then lists the folder: whoever finds
another live claim withdraws. Of two contenders, whichever lists last sees the other's claim, so
at most one holds the lease. All this needs of the store is that a finished write is listed, which
local disks, S3 and GCS give. A conditional write (create if absent) would do the same with one
request, but pyarrow's file systems offer none (github.com/apache/arrow/issues/44281), and not every
store that speaks S3 has it. A claim lives until it expires; its holder renews it from a thread. A
claim of a dead process of this machine is dead at once. The clocks of two machines must agree
within seconds; the processes of one are told apart by ticks since its boot, which no change of
the clock moves. Whoever holds a run writes to it only while its claim is there.
"""

from __future__ import annotations

import logging
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from autoquant_ray.errors import HeldError, StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import LOCK

logger = logging.getLogger(__name__)

DEFAULT_TTL_S = 30.0
_TRIES = 5
BRIEF_WAIT_S = 10.0
"""How long commands of seconds (solve, report, ...) wait for each other."""
_POLL_S = 0.25
_LOOK_S = 1.0
"""Seconds for which a claim in an object store, once seen, is taken to be there."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One contender.

    Attributes:
        id: Unique; also the name of its file.
        holder: Who, for people: host and process.
        machine: Host, boot and process namespace: where ``pid`` means something.
        pid: Process.
        process_start: Start of that process in ticks since the boot (without ``/proc``: seconds
            since the epoch); tells a reused number.
        since: When it was claimed, seconds since the epoch.
        expires: When it is dead unless renewed, seconds since the epoch.
    """

    id: str
    holder: str
    machine: str
    pid: int
    process_start: float
    since: float
    expires: float

    def is_live(self, now: float) -> bool:
        """Whether its holder may still be at work."""
        return now < self.expires and not self._is_dead_here()

    def _is_dead_here(self) -> bool:
        return self.machine == _machine() and _process_start(self.pid) != self.process_start


class Lease:
    """A held lease.

    Args:
        directory: Where the folder of claims is.
        folder: Its name.
        claim: Our claim, already written.
        ttl_s: Seconds from a renewal to the expiry.
    """

    def __init__(self, directory: RunDirectory, folder: str, claim: Claim, ttl_s: float) -> None:
        self._directory = directory
        self._folder = folder
        self._claim = claim
        self._seen_s = time.monotonic()
        self._ttl_s = ttl_s
        self._stopped = threading.Event()
        self._is_lost = False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Check that the lease is still ours.

        Raises:
            HeldError: Its claim is gone, or could not be renewed in time, so that another may have
                taken over.
        """
        if self._is_lost or time.time() >= self._claim.expires:  # a renewal may hang
            raise HeldError(
                f"{self._directory.uri}: the lease was lost (it could not be renewed within "
                f"{self._ttl_s:g} s), another process may have taken over"
            )
        if not self._is_there():
            raise HeldError(
                f"{self._directory.uri}: the lease was lost (its claim "
                f"{_file(self._folder, self._claim.id)} is gone), another process may have taken "
                "over; start again once that has ended"
            )

    def release(self) -> None:
        """Give it back."""
        self._stopped.set()
        self._thread.join()
        try:
            self._directory.delete(_file(self._folder, self._claim.id))
        except StoreError as error:  # it ends with this process, or expires
            logger.warning("the lease could not be given back: %s", error)
        self._directory.delete_if_empty(self._folder)
        self._directory.delete_if_empty("")

    def _is_there(self) -> bool:
        """Whether the claim is still where it was written, and ours."""
        now = time.monotonic()
        if self._directory.is_local or now - self._seen_s >= _LOOK_S:
            seen = _read(self._directory, _file(self._folder, self._claim.id))
            if seen is None or (seen.pid, seen.machine) != (self._claim.pid, self._claim.machine):
                self._is_lost = True
                return False
            self._seen_s = now
        return True

    def _renew(self) -> None:
        while not self._stopped.wait(self._ttl_s / 3):
            now = time.time()
            if now >= self._claim.expires:
                self._is_lost = True
                return
            renewed = replace(self._claim, expires=now + self._ttl_s)
            try:
                if not self._is_there():
                    return
                self._directory.write_json(_file(self._folder, renewed.id), asdict(renewed))
                if (
                    time.time() >= self._claim.expires
                ):  # the write hung; another may have taken over
                    self._is_lost = True
                    return
                self._claim = renewed
            except StoreError as error:
                logger.warning("the lease could not be renewed: %s", error)


@contextmanager
def lease(
    directory: RunDirectory,
    folder: str = LOCK,
    *,
    ttl_s: float = DEFAULT_TTL_S,
) -> Iterator[Lease]:
    """Hold the lease of a folder while the body runs.

    Waits while another's claim is neither dead nor renewed, at most ``ttl_s``: its holder may have
    crashed on another machine. While the lease of a run is held, every write of ``directory``
    requires it first, and who asks for it again through the same object has it.

    Args:
        directory: Where the claims are written.
        folder: Folder of the claims inside it.
        ttl_s: Seconds after which a claim that nobody renews is dead.

    Yields:
        The lease, whose ``require()`` fails once it is lost.

    Raises:
        HeldError: Another process holds it; the message names the holder.
    """
    if folder == LOCK and isinstance(directory.held, Lease):
        yield directory.held
        return
    claims = RunDirectory(directory.uri)
    claimed = Lease(claims, folder, _claim(claims, folder, ttl_s), ttl_s)
    if folder == LOCK:
        directory.held = claimed
    try:
        yield claimed
    finally:
        if folder == LOCK:
            directory.held = None
        claimed.release()


def require_free(directory: RunDirectory) -> None:
    """Refuse a run at which another process of this machine is at work, before a cluster is asked.

    Raises:
        HeldError: One is.
    """
    here = [claim for claim in _live_claims(directory, LOCK) if claim.machine == _machine()]
    if here and directory.held is None:
        raise _held(directory, here)


@contextmanager
def brief_lease(directory: RunDirectory, wait_s: float | None = None) -> Iterator[Lease]:
    """Hold the lease of a run for work of seconds; waits for others who do the same.

    Args:
        directory: The run.
        wait_s: How long to wait for another holder at most; default :data:`BRIEF_WAIT_S`.

    Raises:
        HeldError: Another process works on the run for longer.
    """
    give_up = time.monotonic() + (BRIEF_WAIT_S if wait_s is None else wait_s)
    with ExitStack() as stack:
        while True:
            try:
                held = stack.enter_context(lease(directory))
                break
            except HeldError:
                if time.monotonic() >= give_up:
                    raise
            time.sleep(_POLL_S)
        yield held


def _claim(directory: RunDirectory, folder: str, ttl_s: float) -> Claim:
    """Write a claim; if another live claim is there, withdraw and try again."""
    for _ in range(_TRIES):
        _wait_for_dead(directory, folder, ttl_s)
        now = time.time()
        claim = Claim(
            id=uuid.uuid4().hex,
            holder=f"process {os.getpid()} on {platform.node()}",
            machine=_machine(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()) or 0.0,
            since=now,
            expires=now + ttl_s,
        )
        try:
            directory.write_json(_file(folder, claim.id), asdict(claim))
            others = _live_claims(directory, folder, besides=claim.id)
        except BaseException:
            with suppress(StoreError):
                directory.delete(_file(folder, claim.id))
            raise
        if not others:
            return claim
        directory.delete(_file(folder, claim.id))
        time.sleep(random.uniform(0.1, 0.5))
    raise _held(directory, others)


def _wait_for_dead(directory: RunDirectory, folder: str, ttl_s: float) -> None:
    """Return once no claim is live; raise as soon as a claim is seen to be renewed."""
    seen = {claim.id: claim for claim in _live_claims(directory, folder)}
    if not seen:
        return
    here = [c for c in seen.values() if c.machine == _machine()]
    if here:
        raise _held(directory, here)
    last = min(max(claim.expires for claim in seen.values()), time.time() + 2 * ttl_s)
    logger.info("%s; waiting for its lease to end", _held(directory, list(seen.values())))
    while time.time() < last + _POLL_S:
        time.sleep(_POLL_S)
        live = _live_claims(directory, folder)
        renewed = [c for c in live if c.id not in seen or c.expires > seen[c.id].expires]
        if renewed:
            raise _held(directory, renewed)
        if not live:
            return


def _live_claims(directory: RunDirectory, folder: str, besides: str = "") -> list[Claim]:
    """Others' live claims, oldest first; files of dead claims are deleted."""
    now, live = time.time(), []
    for name in directory.list_files(folder):
        if not name.endswith(".json") or name == f"{besides}.json":
            continue
        claim = _read(directory, f"{folder}/{name}")
        if claim is None:
            continue
        if claim.is_live(now):
            live.append(claim)
        else:
            directory.delete(f"{folder}/{name}")
    return sorted(live, key=lambda claim: claim.since)


def _read(directory: RunDirectory, name: str) -> Claim | None:
    try:
        return Claim(**directory.read_json(name))
    except StoreError:
        if directory.exists(name):
            raise
        return None  # withdrawn since it was listed
    except TypeError:
        raise StoreError(f"{directory.path(name)} is not a lock of ours; delete it") from None


def _held(directory: RunDirectory, claims: list[Claim]) -> HeldError:
    first = claims[0]
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(first.since))
    return HeldError(
        f"{directory.uri} is in use by {first.holder} since {since} UTC; start again once that has "
        "ended"
    )


def _file(folder: str, name: str) -> str:
    return f"{folder}/{name}.json"


def _process_start(pid: int) -> float | None:
    """When a process of this machine started; None where there is none of this number."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        return float(stat.rpartition(b")")[2].split()[19])  # the name before may hold anything
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _machine() -> str:
    parts: list[Any] = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text())
        except OSError:
            parts.append(psutil.boot_time())
    return "/".join(str(part).strip() for part in parts)

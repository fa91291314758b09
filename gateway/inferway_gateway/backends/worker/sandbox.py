"""Locking a worker process in before it touches a model that came from outside.

A model file is a program for native code that nobody has proved safe, so the process that loads it can do almost
nothing besides. Once everything is imported and the tensors' memory is there, ``confine`` takes away, layer by layer:

    environment    its variables, also where the kernel shows them to others
    rlimits        memory, processor time, open files; no files written, no core dumps
    capabilities   what root may do beyond others
    dumpable       others of the same user cannot read its memory
    no_new_privs   nothing it starts can gain rights; the layers below need it
    landlock       files: reading below the given directories, nothing else; no TCP; no signals to other processes and
                   no abstract Unix sockets of theirs
    seccomp        every system call but those that running a model needs, see ``seccomp.py``

Nothing of this can be undone by the process. A layer that the kernel does not have is left out and named in the
result; who starts workers decides whether that is a warning or the end. Plain ctypes: no library does the whole of it.

Measured 2026-11 on Linux 6.18: confining takes under 1 ms, a run afterwards as long as before.

Source: landlock(7), seccomp(2), prctl(2), capset(2), setrlimit(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import resource
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from . import seccomp

MIB: Final = 1 << 20

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE, _PR_GET_SECCOMP, _PR_SET_SECCOMP = 3, 4, 21, 22
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FLAG_TSYNC = 1, 1
_SECCOMP_GET_ACTION_AVAIL: Final = 2
_CAPABILITY_VERSION_3: Final = 0x20080522
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
"""The same on every architecture."""
_LANDLOCK_VERSION_FLAG: Final = 1
_LANDLOCK_PATH_BENEATH: Final = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS: Final = ((1, 0x1FFF), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
"""First ABI, and the rights over files that it brought: all of them are taken, reading is given back."""
_NET_RIGHTS: Final = 0b11
"""Binding and connecting TCP sockets, from ABI 4."""
_SCOPES: Final = 0b11
"""Abstract Unix sockets and signals, from ABI 6."""

REFUSALS: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
"""What the layers answer with."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the process may use, besides what it has already. None leaves a limit as it is.

    Attributes:
        address_space_bytes: mapped memory, code and shared memory included, some 1 GiB more than is resident once
            ONNX Runtime is imported. A model that wants more gets a clean error.
        cpu_s: processor time over the whole life of the process; it is for throw-away processes.
        open_files: file descriptors.
        file_bytes: the size to which a file can be made to grow, one in memory (memfd) included: 0 means that memory
            to share has to be handed over ready.
        processes: of the user, threads included, so 0 stops threads from being started. The system call filter tells
            threads from processes; this is for where it is missing. Root is not bound by it.
        core_bytes: of a core dump, which would hold the callers' data.
    """

    address_space_bytes: int | None = None
    cpu_s: int | None = None
    open_files: int | None = 256
    file_bytes: int | None = 0
    processes: int | None = None
    core_bytes: int | None = 0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this kernel offers.

    Attributes:
        machine: as ``uname -m`` says.
        landlock_abi: 0 where Landlock is missing or switched off; 7 and more has everything that is used here.
        seccomp: whether filters can be set, and this architecture's system calls are known.
        no_new_privs: whether rights can be given up for good.
    """

    machine: str
    landlock_abi: int
    seccomp: bool
    no_new_privs: bool

    @property
    def missing(self) -> tuple[str, ...]:
        """In words, what a worker on this kernel will not be kept from; empty where every layer is there."""
        lacks: list[str] = []
        if not self.no_new_privs:
            lacks.append("the kernel has no no_new_privs, which the other layers need")
        if self.landlock_abi == 0:
            lacks.append("the kernel has no Landlock: a worker can read what the gateway's user can read")
        elif self.landlock_abi < 6:
            lacks.append(f"Landlock has ABI {self.landlock_abi}: signals are not scoped before 6")
        if not self.seccomp:
            lacks.append(f"no system call filter on {self.machine}: a worker can start programs and open sockets")
        return tuple(lacks)


@dataclass(frozen=True, slots=True)
class Confinement:
    """What holds for the process from now on.

    Attributes:
        held: names of layers, as in the module's description.
        missing: name of a layer that does not hold, or not wholly, to the reason.
        landlock_abi: as used; 0 where it is not.
    """

    held: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    landlock_abi: int = 0

    @property
    def complete(self) -> bool:
        return not self.missing


class SandboxError(Exception):
    """A layer that is there could not be put on: the process must not go on to touch a model."""


@functools.cache
def capabilities() -> Capabilities:
    """What the running kernel offers. Changes nothing; no privileges needed."""
    machine = os.uname().machine if hasattr(os, "uname") else "unknown"
    if not sys.platform.startswith("linux"):
        return Capabilities(machine, 0, False, False)
    abi = _syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION_FLAG)
    architecture = seccomp.ARCHITECTURES.get(machine)
    filters = False
    if architecture is not None:
        action = ctypes.c_uint32(seccomp.KILL)
        filters = _syscall(architecture.seccomp, _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0
    return Capabilities(machine, max(abi, 0), filters, _prctl(_PR_GET_NO_NEW_PRIVS) >= 0)


def confine(
    readable: Sequence[int],
    limits: Limits | None = None,
    *,
    keep: Collection[int] | None = None,
    keep_environment: Collection[str] = (),
    executable_memory: bool = False,
) -> Confinement:
    """Lock this process in, for good.

    Call it in the process that will load the model, after every import and before the first byte of the model, from
    the only thread: Landlock binds the thread that asks and those it starts later. What is open stays usable.

    Args:
        readable: descriptors of directories, or of files, that may be read, with everything below them. They can be
            closed afterwards.
        keep: descriptors to keep open besides 0 to 2; None keeps all.
        keep_environment: names of variables to keep.
        executable_memory: allow memory to become code: shared libraries can be loaded and compiled kernels made, which
            execution providers on other devices need.
    Returns:
        What holds. A layer that the kernel lacks does no harm and is named.
    Raises:
        SandboxError: a layer that the kernel has was refused. The process is in an unknown state and should end.
    """
    present = capabilities()
    held: list[str] = []
    missing: dict[str, str] = {}

    def put_on(layer: str, reason: str = "") -> None:
        if reason:
            missing[layer] = reason
        else:
            held.append(layer)

    _forget_environment(keep_environment)
    put_on("environment")
    if keep is not None:
        _close_others({0, 1, 2, *keep, *readable})
    _set_limits(limits or Limits())
    put_on("rlimits")
    if not sys.platform.startswith("linux"):
        for layer in ("capabilities", "dumpable", "no_new_privs", "landlock", "seccomp"):
            put_on(layer, "only Linux has it")
        return Confinement(tuple(held), missing)

    tasks = Path("/proc/self/task")
    threads = sum(1 for _ in tasks.iterdir()) if tasks.is_dir() else 1
    put_on("capabilities", _drop_capabilities())
    put_on("dumpable", "" if _prctl(_PR_SET_DUMPABLE, 0) == 0 else "the kernel refused it")
    put_on("no_new_privs", "" if _prctl(_PR_SET_NO_NEW_PRIVS, 1) == 0 else "the kernel does not have it")
    abi = 0
    if present.landlock_abi:
        abi = present.landlock_abi
        _restrict_files(readable, abi)
        reasons = []
        if abi < 6:
            reasons.append(f"ABI {abi} of the kernel does not scope signals" + (", nor TCP" if abi < 4 else ""))
        if threads > 1:
            reasons.append(f"{threads - 1} threads were there before and are not bound by it")
        put_on("landlock", "; ".join(reasons))
    else:
        put_on("landlock", "the kernel does not have it, or it is switched off")
    if present.seccomp:
        _filter_calls(seccomp.ARCHITECTURES[present.machine], executable_memory)
        put_on("seccomp")
    else:
        put_on("seccomp", f"the kernel does not have it, or the calls of {present.machine} are not known")
    return Confinement(tuple(held), missing, abi)


def probe() -> tuple[str, ...]:
    """Ask the kernel whether the layers are really on: names of forbidden calls that it would take.

    Takes some ten microseconds and changes nothing, wherever it is called: each call has arguments that cannot work,
    so that the answer tells a filter (EPERM) from the call itself (EFAULT and the like). For the start of every
    worker; ``self_test.py`` is the thorough form.
    """
    found = [name for name, call in _harmless_calls().items() if call() not in REFUSALS]
    if _prctl(_PR_GET_NO_NEW_PRIVS) != 1:
        found.append("no_new_privs")
    if _prctl(_PR_GET_DUMPABLE) != 0:
        found.append("dumpable")
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        if error.errno not in REFUSALS:
            found.append("read outside")
    else:
        found.append("read outside")
    return tuple(found)


# ---- the layers


def _forget_environment(keep: Collection[str]) -> None:
    kept = {name: value for name, value in os.environ.items() if name in keep}
    os.environ.clear()
    # What the process was started with stays where the kernel put it, and where /proc shows it, whatever the
    # dictionary says.
    with contextlib.suppress(OSError, IndexError, ValueError):
        start, end = (int(part) for part in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
        if 0 < start < end:
            ctypes.memset(start, 0, end - start)
    os.environ.update(kept)


def _close_others(kept: set[int]) -> None:
    # Not a range up to the limit: that may be a thousand million.
    for entry in list(Path("/dev/fd").iterdir()):
        if int(entry.name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(entry.name))


def _set_limits(limits: Limits) -> None:
    wanted = [
        ("RLIMIT_CPU", limits.cpu_s),
        ("RLIMIT_NOFILE", limits.open_files),
        ("RLIMIT_FSIZE", limits.file_bytes),
        ("RLIMIT_NPROC", limits.processes),
        ("RLIMIT_CORE", limits.core_bytes),
        ("RLIMIT_AS", limits.address_space_bytes),
    ]
    for name, value in wanted:
        which = getattr(resource, name, None)
        if value is None or which is None:
            continue
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(which, (value, value))
        except (OSError, ValueError) as error:
            raise SandboxError(f"{name} could not be set to {value}: {error}") from error


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _drop_capabilities() -> str:
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    number = {"x86_64": 126, "aarch64": 91}.get(os.uname().machine)
    if number is None:
        return f"the calls of {os.uname().machine} are not known"
    return "" if _syscall(number, ctypes.byref(header), nothing) == 0 else os.strerror(ctypes.get_errno())


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _restrict_files(readable: Sequence[int], abi: int) -> None:
    handled = sum(rights for first, rights in _FILE_RIGHTS if abi >= first)
    rules = _Ruleset(handled, _NET_RIGHTS if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    # An older kernel takes a longer structure as long as what it does not know is zero.
    ruleset = _syscall(_LANDLOCK_CREATE, ctypes.byref(rules), ctypes.sizeof(rules), 0)
    if ruleset < 0:
        raise SandboxError(f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}")
    try:
        for fd in readable:
            is_directory = (os.fstat(fd).st_mode & 0o170000) == 0o040000
            rule = _PathBeneath(_READ_FILE | _READ_DIR if is_directory else _READ_FILE, fd)
            if _syscall(_LANDLOCK_ADD, ruleset, _LANDLOCK_PATH_BENEATH, ctypes.byref(rule), 0) != 0:
                raise SandboxError(f"landlock_add_rule: {os.strerror(ctypes.get_errno())}")
        if _syscall(_LANDLOCK_RESTRICT, ruleset, 0) != 0:
            raise SandboxError(f"landlock_restrict_self: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(ruleset)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _filter_calls(architecture: seccomp.Architecture, executable_memory: bool) -> None:
    code = seccomp.program(architecture, os.getpid(), executable_memory)
    program = _Program(len(code), seccomp.pack(code))
    refused = _syscall(architecture.seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FLAG_TSYNC, ctypes.byref(program))
    if refused > 0:
        raise SandboxError(f"thread {refused} has a system call filter of its own")
    if refused < 0:
        raise SandboxError(f"seccomp: {os.strerror(ctypes.get_errno())}")


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: Any) -> int:
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = _library().syscall(ctypes.c_long(number), *wide)
    return result


def _prctl(option: int, *arguments: int) -> int:
    wide = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    result: int = _library().prctl(ctypes.c_int(option), *wide)
    return result


# ---- trying them


def _harmless_calls() -> dict[str, Callable[[], int]]:
    def errno_of(number: int, *arguments: Any) -> Callable[[], int]:
        def call() -> int:
            ctypes.set_errno(0)
            return 0 if _syscall(number, *arguments) >= 0 else ctypes.get_errno()

        return call

    # What fails for want of sense: no such address family, null pointers, shared handlers without shared memory,
    # processes that cannot be.
    x86 = os.uname().machine == "x86_64"
    return {
        "socket": errno_of(41 if x86 else 198, -1, 0, 0),
        "execve": errno_of(59 if x86 else 221, None, None, None),
        "ptrace": errno_of(101 if x86 else 117, 0x4200, 0, 0, 0),
        "clone": errno_of(56 if x86 else 220, 0x0800, 0, 0, 0, 0),
        "bpf": errno_of(321 if x86 else 280, -1, None, 0),
        "io_uring_setup": errno_of(425, 0, None),
        "mount": errno_of(165 if x86 else 40, None, None, None, 0, None),
        "openat for writing": errno_of(257 if x86 else 56, -100, None, os.O_WRONLY, 0),
        "kill": errno_of(62 if x86 else 129, 0x7FFFFFFF, 0),
    }

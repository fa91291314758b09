"""Which system calls a worker may make: a list of what running a model needs, and nothing else.

A deny list has to know every dangerous call of every kernel to come; this one has to know what Python, numpy and ONNX
Runtime need once everything is imported, which ``strace`` shows and which is little: memory, threads, time, reading
what is open, opening for reading (Landlock says what). A call that is not listed fails with EPERM, which libraries
take for a refusal and go on. Three things look at arguments: threads yes but no processes, opening but not for
writing, signals and limits for the process itself only. Two calls hide their arguments in memory where a filter cannot
look (``clone3``, ``openat2``): they count as unknown to the kernel (ENOSYS), whereupon the C library takes the older
ones. The same answer meets calls that are younger than this list.

The filter costs nothing that shows: since 5.11 the kernel remembers which calls it always allows, and a run makes none
of the others.

Source: seccomp(2), "Seccomp BPF" of the kernel's documentation; numbers from asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_TABLE: Final = """
    read 0 63; write 1 64; readv 19 65; writev 20 66; pread64 17 67; pwrite64 18 68; preadv 295 69; pwritev 296 70
    preadv2 327 286; close 3 57; close_range 436 436; fstat 5 80; newfstatat 262 79; stat 4 -; lstat 6 -; statx 332 291
    lseek 8 62; munmap 11 215; mremap 25 216; madvise 28 233; brk 12 214; msync 26 227; mincore 27 232
    membarrier 324 283; rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigtimedwait 128 137
    rt_sigpending 127 136; rt_sigsuspend 130 133; sigaltstack 131 132; poll 7 -; ppoll 271 73; select 23 -
    pselect6 270 72; epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -; epoll_pwait 281 22; epoll_pwait2 441 441
    eventfd2 290 19; pipe2 293 59; dup 32 23; dup2 33 -; dup3 292 24; timerfd_create 283 85; timerfd_settime 286 86
    timerfd_gettime 287 87; getitimer 36 102; setitimer 38 103; alarm 37 -; futex 202 98; futex_waitv 449 449
    set_robust_list 273 99; get_robust_list 274 100; rseq 334 293; set_tid_address 218 96; restart_syscall 219 128
    sched_yield 24 124; sched_getaffinity 204 123; getcpu 309 168; clock_gettime 228 113; clock_getres 229 114
    clock_nanosleep 230 115; nanosleep 35 101; gettimeofday 96 169; time 201 -; getrandom 318 278; uname 63 160
    sysinfo 99 179; getrusage 98 165; times 100 153; getpid 39 172; gettid 186 178; getppid 110 173; getpgrp 111 -
    getpgid 121 155; getsid 124 156; getuid 102 174; geteuid 107 175; getgid 104 176; getegid 108 177; getresuid 118 148
    getresgid 120 150; getgroups 115 158; umask 95 166; capget 125 90; getrlimit 97 163; setrlimit 160 164; exit 60 93
    exit_group 231 94; wait4 61 260; access 21 -; faccessat 269 48; faccessat2 439 439; readlink 89 -; readlinkat 267 78
    getcwd 79 17; getdents64 217 61; statfs 137 43; fstatfs 138 44; fadvise64 221 223; memfd_create 319 279
    ftruncate 77 46; fallocate 285 47; sendmsg 46 211; recvmsg 47 212; recvfrom 45 207; shutdown 48 210
    getsockname 51 204; getsockopt 55 209; arch_prctl 158 -; get_mempolicy 239 236; sched_getscheduler 145 120
    sched_getparam 143 121; sched_get_priority_max 146 125; sched_get_priority_min 147 126
"""
"""Calls that are always allowed: name, number on x86-64, number on aarch64."""

_CHECKED: Final[dict[str, tuple[int | None, int | None]]] = {
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "open": (2, None),
    "openat": (257, 56),
    "clone": (56, 220),
    "prlimit64": (302, 261),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prctl": (157, 167),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "sched_setaffinity": (203, 122),
    "sendto": (44, 206),
}
"""Calls whose arguments decide."""

_HIDDEN: Final[dict[str, tuple[int, int]]] = {"clone3": (435, 435), "openat2": (437, 437)}
_YOUNGEST: Final = 450
"""The highest number that was looked at when this list was made; higher ones do not exist for a worker."""

_X32_BIT: Final = 0x40000000
"""x86-64 has a second set of numbers, which would go around the list."""

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16

ALLOW: Final = 0x7FFF0000
KILL: Final = 0x80000000
_ERRNO: Final = 0x00050000
DENY: Final = _ERRNO | errno.EPERM
ABSENT: Final = _ERRNO | errno.ENOSYS

_WRITING: Final = 0o3 | 0o100 | 0o1000
"""O_ACCMODE, O_CREAT, O_TRUNC; O_TMPFILE needs one of the first."""
_CLONE_THREAD: Final = 0x00010000
_CLONE_NAMESPACES: Final = 0x7E020000
_PROT_EXEC: Final = 4
_PRCTL: Final = (15, 16, 0x53564D41, 3, 39, 21)
"""PR_SET_NAME, PR_GET_NAME, PR_SET_VMA, PR_GET_DUMPABLE, PR_GET_NO_NEW_PRIVS, PR_GET_SECCOMP."""
_IOCTL: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
_FCNTL: Final = (0, 1, 2, 3, 4, 1030, 1033, 1034)
"""F_DUPFD to F_SETFL, F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS. Not F_SETOWN, by which the kernel sends signals."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What tells the system calls of one kind of processor.

    Attributes:
        column: of the tables above.
        audit: AUDIT_ARCH of the kernel, which goes with every call.
        seccomp: number of seccomp(2).
    """

    column: int
    audit: int
    seccomp: int


ARCHITECTURES: Final = {"x86_64": Architecture(0, 0xC000003E, 317), "aarch64": Architecture(1, 0xC00000B7, 277)}
"""By ``os.uname().machine``. Both are little-endian, which reading arguments takes for granted."""


def number(name: str, architecture: Architecture) -> int | None:
    """The number of a call of the lists above; None where the architecture does not have it."""
    return _numbers()[name][architecture.column]


def _numbers() -> dict[str, tuple[int | None, int | None]]:
    found: dict[str, tuple[int | None, int | None]] = {}
    for entry in _TABLE.replace("\n", ";").split(";"):
        if entry.strip():
            name, *columns = entry.split()
            x86, arm = (None if column == "-" else int(column) for column in columns)
            found[name] = (x86, arm)
    return {**found, **_CHECKED, **_HIDDEN}


Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, constant."""


def program(architecture: Architecture, pid: int, executable_memory: bool = False) -> list[Instruction]:
    """The filter.

    Args:
        pid: of the process that will be confined: it may send signals to itself, and to nobody else.
        executable_memory: whether memory may become code, which loading a shared library needs. Import first.
    """
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_GREATER_EQUAL, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, KILL),
    ]
    numbers = _numbers()
    for name, columns in numbers.items():
        own = columns[architecture.column]
        if own is None:
            continue
        if name in _HIDDEN:
            block: list[Instruction] = [(_RETURN, 0, 0, ABSENT)]
        elif name in _CHECKED:
            block = _rule(name, pid, executable_memory)
        else:
            block = [(_RETURN, 0, 0, ALLOW)]
        code += [(_EQUAL, 0, len(block), own), *block]
    return [*code, (_GREATER_EQUAL, 0, 1, _YOUNGEST + 1), (_RETURN, 0, 0, ABSENT), (_RETURN, 0, 0, DENY)]


def pack(code: Iterable[Instruction]) -> bytes:
    """As an array of ``struct sock_filter``."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _rule(name: str, pid: int, executable_memory: bool) -> list[Instruction]:
    if name in ("mmap", "mprotect"):
        return [(_RETURN, 0, 0, ALLOW)] if executable_memory else _without(2, _PROT_EXEC)
    rules: dict[str, Callable[[], list[Instruction]]] = {
        "open": lambda: _without(1, _WRITING),
        "openat": lambda: _without(2, _WRITING),
        "clone": _thread,
        "prlimit64": lambda: _one_of(0, (0, pid)),
        "kill": lambda: _one_of(0, (pid,)),
        "tgkill": lambda: _one_of(0, (pid,)),
        "prctl": lambda: _one_of(0, _PRCTL),
        "ioctl": lambda: _one_of(1, _IOCTL),
        "fcntl": lambda: _one_of(1, _FCNTL),
        "sched_setaffinity": lambda: _one_of(0, (0, pid)),
        # Without an address: what is connected already may be written to, nothing else can be reached.
        "sendto": lambda: _null(4),
    }
    return rules[name]()


def _low(argument: int) -> Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument)


def _high(argument: int) -> Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument + 4)


def _without(argument: int, bits: int) -> list[Instruction]:
    return [_low(argument), (_ANY_BIT, 0, 1, bits), (_RETURN, 0, 0, DENY), (_RETURN, 0, 0, ALLOW)]


def _thread() -> list[Instruction]:
    return [
        _low(0),
        (_ANY_BIT, 0, 2, _CLONE_THREAD),
        (_ANY_BIT, 1, 0, _CLONE_NAMESPACES),
        (_RETURN, 0, 0, ALLOW),
        (_RETURN, 0, 0, DENY),
    ]


def _one_of(argument: int, values: Sequence[int]) -> list[Instruction]:
    # These arguments are ints for the kernel, which drops the upper half: so does this.
    tests = [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [_low(argument), *tests, (_RETURN, 0, 0, DENY), (_RETURN, 0, 0, ALLOW)]


def _null(argument: int) -> list[Instruction]:
    return [
        _low(argument),
        (_EQUAL, 0, 3, 0),
        _high(argument),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, ALLOW),
        (_RETURN, 0, 0, DENY),
    ]

"""The filter, read by a small interpreter of its language, so that both architectures are tried on any."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence

import pytest

from inferway_gateway.backends.worker import seccomp
from inferway_gateway.backends.worker.seccomp import ABSENT, ALLOW, ARCHITECTURES, DENY, KILL, Architecture, number

PID = 4242

both = pytest.mark.parametrize("machine", sorted(ARCHITECTURES))


def verdict(
    architecture: Architecture,
    call: int,
    arguments: Sequence[int] = (),
    *,
    audit: int | None = None,
    code: bool = False,
) -> int:
    """What the filter says to a call: classic BPF over ``struct seccomp_data``."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", call, audit or architecture.audit, 0, *(value % (1 << 64) for value in padded))
    program = seccomp.program(architecture, PID, executable_memory=code)
    accumulator = at = 0
    while True:
        operation, if_true, if_false, constant = program[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif operation == 0x06:
            return constant
        else:
            holds = {
                0x15: accumulator == constant,
                0x35: accumulator >= constant,
                0x45: bool(accumulator & constant),
            }[operation]
            at += if_true if holds else if_false


def named(machine: str, name: str, *arguments: int, code: bool = False) -> int:
    architecture = ARCHITECTURES[machine]
    call = number(name, architecture)
    assert call is not None
    return verdict(architecture, call, arguments, code=code)


DENIED = {
    # name: x86-64, aarch64
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "accept4": (288, 242), "execve": (59, 221),
    "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "bpf": (321, 280), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "perf_event_open": (298, 241), "keyctl": (250, 219),
    "add_key": (248, 217), "userfaultfd": (323, 282), "unlinkat": (263, 35), "renameat2": (316, 276),
    "linkat": (265, 37), "mkdirat": (258, 34), "fchmodat": (268, 53), "truncate": (76, 45), "setns": (308, 268),
    "unshare": (272, 97), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "seccomp": (317, 277), "capset": (126, 91),
    "setuid": (105, 146), "init_module": (175, 105), "kexec_load": (246, 104),
    "open_by_handle_at": (304, 265), "pkey_mprotect": (329, 288),
    "setpriority": (141, 140), "sched_setscheduler": (144, 119), "kcmp": (312, 272), "reboot": (169, 142),
    "landlock_restrict_self": (446, 446), "socketpair": (53, 199), "memfd_secret": (447, 447),
}  # fmt: skip


@both
@pytest.mark.parametrize("name", sorted(DENIED))
def test_what_a_model_never_needs_is_refused(machine: str, name: str) -> None:
    architecture = ARCHITECTURES[machine]
    assert verdict(architecture, DENIED[name][architecture.column]) == DENY


def test_x86_calls_that_the_other_architecture_never_had_are_refused_too() -> None:
    x86 = ARCHITECTURES["x86_64"]
    for call in (57, 58, 82, 83, 85, 86, 87, 88, 90):  # fork, vfork, rename, mkdir, creat, link, unlink, symlink, chmod
        assert verdict(x86, call) == DENY


@both
@pytest.mark.parametrize(
    "name", ["read", "futex", "munmap", "madvise", "exit_group", "memfd_create", "recvmsg", "poll"]
)
def test_what_running_needs_is_allowed(machine: str, name: str) -> None:
    if number(name, ARCHITECTURES[machine]) is not None:
        assert named(machine, name) == ALLOW


@both
def test_files_open_for_reading_only(machine: str) -> None:
    assert named(machine, "openat", -100, 0, os.O_RDONLY | os.O_CLOEXEC) == ALLOW
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE | os.O_RDWR):
        assert named(machine, "openat", -100, 0, flags) == DENY


@both
def test_threads_start_and_processes_do_not(machine: str) -> None:
    thread = 0x3D0F00  # what glibc asks for
    assert named(machine, "clone", thread) == ALLOW
    assert named(machine, "clone", 17) == DENY  # SIGCHLD: fork
    assert named(machine, "clone", 0x4111) == DENY  # CLONE_VM | CLONE_VFORK | SIGCHLD: what posix_spawn does
    assert named(machine, "clone", thread | 0x10000000) == DENY
    assert named(machine, "clone3") == ABSENT


@both
def test_only_the_process_itself_is_signalled_and_limited(machine: str) -> None:
    assert named(machine, "kill", PID, 6) == ALLOW
    assert named(machine, "tgkill", PID, PID + 1, 6) == ALLOW
    assert named(machine, "prlimit64", 0, 7) == ALLOW
    for other in (1, PID + 1, -1, 0):
        assert named(machine, "kill", other, 9) == DENY
        assert named(machine, "tgkill", other, other, 9) == DENY
    for other in (1, PID + 1):
        assert named(machine, "prlimit64", other, 7) == DENY
        assert named(machine, "sched_setaffinity", other, 8) == DENY


@both
def test_memory_becomes_code_only_where_that_is_allowed(machine: str) -> None:
    for name in ("mmap", "mprotect"):
        assert named(machine, name, 0, 4096, 3) == ALLOW
        assert named(machine, name, 0, 4096, 5) == DENY
        assert named(machine, name, 0, 4096, 7, code=True) == ALLOW


@both
def test_what_was_given_up_cannot_be_asked_back(machine: str) -> None:
    assert named(machine, "prctl", 15) == ALLOW
    for option in (4, 22, 24, 38, 47):  # dumpable, seccomp, bounding set, no_new_privs, ambient
        assert named(machine, "prctl", option, 1) == DENY


@both
def test_sockets_that_are_there_answer_and_reach_nobody_else(machine: str) -> None:
    assert named(machine, "sendto", 3, 4096, 10, 0, 0, 0) == ALLOW
    assert named(machine, "sendto", 3, 4096, 10, 0, 0x1000, 16) == DENY
    assert named(machine, "sendto", 3, 4096, 10, 0, 1 << 32, 16) == DENY
    assert named(machine, "fcntl", 3, 3) == ALLOW
    assert named(machine, "fcntl", 3, 8, 1) == DENY
    assert named(machine, "ioctl", 0, 0x5401) == ALLOW
    assert named(machine, "ioctl", 0, 0x5412) == DENY  # TIOCSTI types into a terminal


@both
def test_calls_of_another_architecture_end_the_process(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    assert verdict(architecture, 0, audit=0x40000003) == KILL
    assert verdict(architecture, 0x40000000) == KILL


@both
def test_calls_that_are_younger_than_the_list_do_not_exist(machine: str) -> None:
    assert verdict(ARCHITECTURES[machine], 463) == ABSENT == 0x50000 | errno.ENOSYS


@both
def test_the_filter_is_as_long_as_the_kernel_takes(machine: str) -> None:
    code = seccomp.program(ARCHITECTURES[machine], PID)
    assert len(seccomp.pack(code)) == 8 * len(code)
    assert len(code) <= 4096
    assert all(0 <= jump < 256 for _, *jumps, _ in code for jump in jumps)

"""The process that workers are forked from: imports everything once, then copies itself, in milliseconds.

Started by the gateway as a fresh interpreter with an empty environment, so nothing that the gateway knows is in it, and
forked from while it does nothing, so no lock of another thread is caught in a copy. It holds no model. It ends with the
gateway: the socket between them closes, or, should another process hold that open, the kernel tells of the parent's
death; and its workers end with it the same way.

    python -m inferway_gateway.backends.worker.forkserver SOCKET_FD PARENT_PID
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import selectors
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Final, NoReturn

from . import messages
from .child import Worker, prepare

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
NAME: Final = "inferway-forks"


def main(argv: list[str]) -> None:
    """Serve until the gateway is gone."""
    fd, parent = int(argv[0]), int(argv[1])
    die_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Whoever signals a whole group means the gateway, which drains first and ends this process last.
        signal.signal(number, signal.SIG_IGN)
    call_it(NAME, "inferway worker fork server")
    prepare()
    gc.collect()
    gc.freeze()  # a collection in a worker would else write to, and so copy, every page that all of them share
    Server(socket.socket(fileno=fd)).serve()


class Server:
    """Forks on request and tells who ended. One thread, which waits in one place.

    Args:
        control: to the gateway.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, tuple[int, int]] = {}
        """pidfd to the number of the spawn and the pid."""
        self._selector = selectors.DefaultSelector()

    def serve(self) -> None:
        self._selector.register(self._control, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    message, fds, _ = messages.receive_some(self._control)
                    if not message:
                        os._exit(0)  # the gateway is gone, the workers hear of it from the kernel
                    self._spawn(message, fds)
                else:
                    self._reap(key.fd)

    def _spawn(self, message: bytes, fds: list[int]) -> None:
        _, number, _ = messages.SERVER_MESSAGE.unpack_from(message)
        title = messages.clean_text(message[messages.SERVER_MESSAGE.size :])
        parent = os.getpid()
        if not fds:
            self._control.send(messages.SERVER_MESSAGE.pack(messages.FAILED, number, errno.EMFILE))
            return
        try:
            with warnings.catch_warnings():
                # Later Pythons warn of threads; ONNX Runtime's import starts one, which waits and holds no lock.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError as error:
            for fd in fds:
                os.close(fd)
            self._control.send(messages.SERVER_MESSAGE.pack(messages.FAILED, number, error.errno or 0))
            return
        if not pid:
            self._become_worker(fds[0], parent, title)
        for fd in fds:
            os.close(fd)
        try:
            pidfd = os.pidfd_open(pid)  # it cannot have been reaped: that is done below, by this thread
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._control.send(messages.SERVER_MESSAGE.pack(messages.FAILED, number, error.errno or 0))
            return
        self._children[pidfd] = (number, pid)
        self._selector.register(pidfd, selectors.EVENT_READ)
        messages.send_fds(self._control, messages.SERVER_MESSAGE.pack(messages.SPAWNED, number, pid), [pidfd])

    def _reap(self, pidfd: int) -> None:
        number, pid = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._control.send(messages.SERVER_MESSAGE.pack(messages.ENDED, number, code))

    def _become_worker(self, fd: int, parent: int, title: str) -> NoReturn:
        code = 70
        with contextlib.suppress(BaseException):
            die_with(parent)
            for pidfd in self._children:
                os.close(pidfd)
            self._selector.close()
            self._control.close()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with open(os.devnull, "r+b", buffering=0) as nothing:  # noqa: PTH123 - a descriptor is what is wanted
                for standard in (0, 1, 2):
                    # What native libraries print could hold callers' data, and nothing bounds how much it is.
                    os.dup2(nothing.fileno(), standard)
            call_it("iw-" + title.rpartition(" ")[2], title)
            code = Worker(socket.socket(fileno=fd)).serve()
        os._exit(code)


def die_with(parent: int) -> None:
    """Be killed when the parent ends, and end at once where it has."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def call_it(name: str, title: str) -> None:
    """Set what ``ps`` shows: the short name and, as far as there is room, the command line.

    The room is that of the arguments, where the kernel reads the command line from. A library for this would move the
    environment to have more room, which the sandbox wipes.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
        # The fields after the name, which may hold spaces and parentheses; arg_start and arg_end are the 48th and 49th.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        room = end - start
        if start and room > 1:
            ctypes.memmove(start, title.encode()[: room - 1].ljust(room, b"\0"), room)


if __name__ == "__main__":
    main(sys.argv[1:])

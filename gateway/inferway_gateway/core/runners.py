"""The threads on which sessions run, shared by all models.

A hop through an executor and back was measured at 95 µs, more than many models run. Here a thread that has ended a run
takes the next batch itself, under the pool's lock, before anything else happens: the batch is formed at the last
moment, when most requests are there to choose from, and no processor waits for the event loop to notice. The loop is
told once for all runs that ended before it looked. Only to an idle thread does the loop hand a batch over.

Of the sources of work (one batcher for each model version) that have some, the one that has used the threads least is
next, so that a busy model delays another by no more than the runs that have begun, and a model of long runs gets no
more time than one of short ones. A source that had nothing to do for a while saves up no claim by it. A run cannot be
taken off its thread; where runs last longer than ``slow_after_s``, as many further threads, within a bound, run the
batches of the other models.

Measured with runs of 5 ms on two shared cores (Python 3.11, uvloop): from the end of a run to the beginning of the next
on the same thread 35 to 110 µs pass, learning and stacking included. Before that a run that has ended must get the
interpreter's lock back. A loop that decodes without a pause keeps it for the switch interval, which at Python's 5 ms
made that wait 0.5 to 0.6 ms in the median, and at 0.2 ms 0.16 to 0.37 ms, without the loop getting less done. The
interval belongs to the process, so it is not set here.

Everything named "lock held" is called by whoever holds ``lock``, on any thread; it is brief and never blocks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Final, Protocol, Self
from weakref import WeakKeyDictionary

_log = logging.getLogger(__name__)

_CLOSE_LIMIT_S: Final = 5.0


class Job(Protocol):
    """One run."""

    @property
    def source(self) -> Source: ...

    @property
    def direct(self) -> bool:
        """Whether the event loop may begin it itself, because another process runs it."""
        ...

    def begin(self) -> bool:
        """Begin a direct job, on the event loop; ``RunnerPool.ended`` is to be called when it is over. False: it has to
        be executed on a thread after all."""
        ...

    def execute(self) -> None:
        """Run, on a runner thread. Keeps its outcome, does not raise."""

    def finish(self) -> None:
        """Answer, on the event loop, after ``execute`` and ``Source.completed``."""


class Source(Protocol):
    """Somewhere that jobs come from."""

    def take(self, now: float) -> Job | None:
        """The next job that may begin now, or None: then ``offer`` says when there may be one. Lock held."""

    def completed(self, job: Job) -> bool:
        """A job of this source was executed. True: there may be another to take. Lock held."""

    def refresh(self) -> None:
        """Jobs of this source began or ended since the last call. On the event loop."""

    def fail(self, error: Exception) -> None:
        """``take`` or ``completed`` raised, which is a defect: answer everybody. On the event loop."""


def usable_cpus() -> int:
    """The processors that this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RunnerPool:
    """Threads that run jobs; ``async with`` opens and closes it, on the loop that is told of what ended.

    Args:
        threads: runs that happen at once; None takes the processors that the process may use.
        slow_after_s: a run that lasts longer no longer counts against ``threads`` for other sources.
        extra_threads: how many such runs may be made up for; None takes ``threads``, and 2 at least.
        clock: seconds, monotonic, the same as the loop's in whole seconds' origin.

    Closing waits for running jobs a few seconds. A thread that still runs then is left behind and logged; it is a
    daemon, so it does not keep the process.
    """

    def __init__(
        self,
        threads: int | None = None,
        *,
        slow_after_s: float = 1.0,
        extra_threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.threads = threads or usable_cpus()
        self.lock = threading.Lock()
        self.clock = clock
        self._slow_after_s = slow_after_s
        self._extra = max(self.threads, 2) if extra_threads is None else extra_threads
        self._ready: list[Source] = []
        self._used: WeakKeyDictionary[Source, float] = WeakKeyDictionary()
        """Seconds of thread time of each source, those it sat out before it became ready included."""
        self._running: dict[Job, float] = {}
        self._direct: list[Job] = []
        """Jobs for the loop to begin as soon as nobody holds the lock."""
        self._launching = False
        self._ended: list[Job] = []
        self._begun: set[Source] = set()
        self._failed: list[tuple[Source, Exception]] = []
        self._told = False
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._idle = 0
        self._members: list[threading.Thread] = []
        self._left: asyncio.Event = asyncio.Event()
        self._gone = 0
        self._watch: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self._closed = True
            self._ready.clear()
            members = list(self._members)
        if self._watch is not None:
            self._watch.cancel()
        for _ in members:
            self._inbox.put(None)
        try:
            async with asyncio.timeout(_CLOSE_LIMIT_S):
                while self._gone < len(members):
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            _log.error("%d runs did not end in %g s and are left behind", len(members) - self._gone, _CLOSE_LIMIT_S)
        else:
            for member in members:
                member.join()

    # -- on the event loop ---------------------------------------------------------------------------------------------

    @property
    def saturated(self) -> bool:
        """Whether no thread is free, so that offering work now would start nothing. Lock held."""
        return len(self._running) >= self.threads

    @property
    def busy(self) -> bool:
        """Whether any run goes on. Lock held."""
        return bool(self._running)

    def adopt(self, job: Job) -> None:
        """Count a run that the event loop began by itself; ``ended`` is to be called when it is over. Lock held."""
        self._running[job] = self.clock()

    def offer(self, source: Source, *, later: bool = False) -> None:
        """``source`` may have a job. Begins what can begin, unless ``later``. On the event loop, lock held.

        Whoever calls this calls ``launch`` and brings ``source`` up to date itself, after it has let go of the lock.
        """
        if self._closed:
            return
        self._enlist(source)
        if later:
            return
        if len(self._running) < self.threads or self._watch is None or self._some_slow():
            self._dispatch()
            self._begun.discard(source)
            if self._begun:
                self._tell_later()

    def offered(self, source: Source) -> bool:
        """Whether ``source`` was offered and has not been asked for a job since. Lock held."""
        return source in self._ready

    def _some_slow(self) -> bool:
        return self.clock() - min(self._running.values()) >= self._slow_after_s

    def _dispatch(self) -> None:
        """Hand jobs to idle threads while there are both. On the event loop, lock held."""
        now = self.clock()
        while self._ready:
            job = self._next(now)
            if job is None:
                break
            self._hand_over(job)
        if self._ready and self._watch is None:
            self._arm(now)
        if self._failed:
            self._tell_later()

    def _tell_later(self) -> None:
        if not self._told:
            self._told = True
            self._tell(self._collect)

    def launch(self) -> None:
        """Begin the direct jobs that ``offer`` found. On the event loop, lock not held."""
        if self._launching:
            return  # a job that ends at once comes back here; the loop below goes on with what follows it
        self._launching = True
        try:
            while self._direct:
                job = self._direct.pop(0)
                if not job.begin():
                    with self.lock:
                        self._to_thread(job)
        finally:
            self._launching = False

    def ended(self, job: Job) -> None:
        """A direct job that was begun is over. On the event loop, lock not held."""
        with self.lock:
            following = self._complete(job, self.clock())
            if following is not None:
                self._hand_over(following)
        self._collect()

    def call(self, callback: Callable[[], None]) -> None:
        """Have something called on the event loop, from any thread."""
        self._tell(callback)

    def _hand_over(self, job: Job) -> None:
        """Leave the job to the loop, where that can begin it, and else to a thread. On the event loop, lock held."""
        if job.direct:
            self._direct.append(job)
        else:
            self._to_thread(job)

    def _to_thread(self, job: Job) -> None:
        """Let an idle thread, or a new one, execute the job. On the event loop, lock held."""
        if self._idle:
            self._idle -= 1
        else:
            name = f"inferway-runner-{len(self._members)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._members.append(thread)
            thread.start()
        self._inbox.put(job)

    def _collect(self) -> None:
        """Answer what ended. On the event loop, once for all runs that ended before it looked."""
        with self.lock:
            if self._ready and not self._closed:
                self._dispatch()
            self._told = False
            ended, self._ended = self._ended, []
            sources, self._begun = self._begun, set()
            failed, self._failed = self._failed, []
        for job in ended:
            sources.add(job.source)
            try:
                job.finish()
            except Exception:
                _log.exception("answering a run failed")
        for source, error in failed:
            source.fail(error)
        for source in sources:
            source.refresh()
        self.launch()

    def _arm(self, now: float) -> None:
        """Look again when the oldest run that is not slow yet becomes slow. On the event loop, lock held."""
        assert self._loop is not None
        until = [started + self._slow_after_s for started in self._running.values()]
        pending = [moment for moment in until if moment > now]
        if pending:
            self._watch = self._loop.call_later(max(min(pending) - now, 0.001), self._look)

    def _look(self) -> None:
        self._watch = None
        self._collect()

    # -- on any thread, lock held --------------------------------------------------------------------------------------

    def _next(self, now: float) -> Job | None:
        """Take a job from the source with the best claim that has one, if one more may run."""
        avoided: set[Source] = set()
        busy = len(self._running)
        if busy >= self.threads:
            slow = [job.source for job, started in self._running.items() if now - started >= self._slow_after_s]
            if busy >= self.threads + min(len(slow), self._extra):
                return None
            # A thread that makes up for a slow run is there for the others; the same model would only block it too.
            avoided.update(slow)
        while candidates := [source for source in self._ready if source not in avoided]:
            source = candidates[0] if len(candidates) == 1 else min(candidates, key=self._claim(now))
            try:
                job = source.take(now)
            except Exception as error:
                # The thread has others to serve. Whoever calls this tells the loop, which answers the callers.
                self._failed.append((source, error))
                job = None
            if job is not None:
                self._running[job] = now
                self._begun.add(source)
                return job
            self._ready.remove(source)
        return None

    def _enlist(self, source: Source) -> None:
        if source in self._ready:
            return
        busy = {*self._ready, *(job.source for job in self._running)}
        used = self._used.get(source, 0.0)
        if busy and source not in busy:
            used = max(used, min(self._used.get(other, 0.0) for other in busy))
        self._used[source] = used
        self._ready.append(source)

    def _claim(self, now: float) -> Callable[[Source], float]:
        """What each source has used, its runs that go on included."""
        going: dict[Source, float] = {}
        for job, started in self._running.items():
            going[job.source] = going.get(job.source, 0.0) + now - started + 1e-9  # who runs already comes second
        return lambda source: self._used.get(source, 0.0) + going.get(source, 0.0)

    def _complete(self, job: Job, now: float) -> Job | None:
        """Account for a job that was executed and take the next one for the same thread."""
        source = job.source
        self._used[source] = self._used.get(source, 0.0) + now - self._running.pop(job)
        self._ended.append(job)
        try:
            more = source.completed(job)
        except Exception as error:
            self._failed.append((source, error))
            more = False
        if more and not self._closed:
            self._enlist(source)
        return None if self._closed else self._next(now)

    # -- on a runner thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        job = self._inbox.get()
        while job is not None:
            job.execute()
            with self.lock:
                following = self._complete(job, self.clock())
                if following is None:
                    self._idle += 1
                tell = not self._told
                self._told = True
            if tell:
                self._tell(self._collect)
            # No name may hold on to the last job while the thread waits: its arrays are the largest things around.
            job = following
            if job is None:
                job = self._inbox.get()
        self._tell(self._leave)

    def _tell(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            _log.debug("the event loop closed before the runners did")

    def _leave(self) -> None:
        self._gone += 1
        self._left.set()

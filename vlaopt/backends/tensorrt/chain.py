"""Components and their loop queued at once on one stream: one CUDA graph from observation to actions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from vlaopt.backends import Link, Port, Value, check_feeds
from vlaopt.backends.tensorrt.cuda import Buffer, Capture
from vlaopt.backends.tensorrt.whole_loop import WholeLoop
from vlaopt.errors import EnvironmentProblem, StageError

if TYPE_CHECKING:
    from vlaopt.backends.tensorrt.session import TensorRtSession

BACKEND = "tensorrt"


class Chain:
    """Links that are run together, each input copied on the device from the link that gives it.

    The first run queues everything as it is and then captures it; where that fails, later runs queue it too. `label`
    names the links, `told` says how they run. Raises StageError, or EnvironmentProblem when memory runs out, where the
    links cannot be chained.
    """

    def __init__(self, links: tuple[Link, ...], sessions: tuple[TensorRtSession, ...]) -> None:
        self.label = ", ".join(link.name + (f" × {len(link.euler.times)}" if link.euler else "") for link in links)
        self.told = ""
        self.sessions = sessions
        self._links = tuple(zip(links, sessions, strict=True))
        self._stream = sessions[0].stream
        self._loops: dict[str, WholeLoop] = {}
        self._copies: dict[str, list[tuple[Buffer, Buffer]]] = {link.name: [] for link in links}
        self._outside: dict[str, list[Port]] = {link.name: [] for link in links}
        self._graph: Capture | None = None
        given: dict[str, Buffer] = {}
        for link, session in self._links:
            if session.dynamic:
                raise StageError(f"the shapes of {link.name} are dynamic")
            self._connect(link, session, given)

    def run(self, tensors: Mapping[str, Value], noise: np.ndarray | None) -> dict[str, Any]:
        """As `vlaopt.backends.Chaining` says. Raises InputError for wrong tensors, StageError as a session does."""
        with ExitStack() as stack:
            for _, session in self._links:
                stack.enter_context(session.alone())
            for link, session in self._links:
                ports = self._outside[link.name]
                check_feeds(ports, {port.name: tensors[port.name] for port in ports if port.name in tensors}, BACKEND)
                session.forget()
                for port in ports:
                    session.take(port.name, tensors[port.name], self._stream)
                if link.euler:
                    self._start(link.euler.state, self._loops[link.name], noise)
            self._execute()
            return self._outcome()

    def _connect(self, link: Link, session: TensorRtSession, given: dict[str, Buffer]) -> None:
        """Where the inputs of a link come from, and what it adds to `given`: its outputs, and the state of its loop."""
        euler = link.euler
        for port in session.inputs:
            if euler and port.name in (euler.state, euler.time):
                continue
            source, to = given.get(port.name), session.buffers[port.name]
            if source is None:
                self._outside[link.name].append(port)
            elif (source.host.dtype, source.host.shape) != (to.host.dtype, to.host.shape):
                raise StageError(f"{port.name} is given as {source.host.dtype}, and {link.name} takes {to.host.dtype}")
            else:
                self._copies[link.name].append((source, to))
        given |= {port.name: session.buffers[port.name] for port in session.outputs}
        if euler:
            loop = self._loops[link.name] = session.whole_loop(self._stream, euler)
            given[euler.state] = loop.state

    def _start(self, state: str, loop: WholeLoop, noise: np.ndarray | None) -> None:
        given = np.asarray(noise, np.float32)
        check_feeds([Port(state, "float32", loop.state.host.shape)], {state: given})
        loop.start(given)

    def _execute(self) -> None:
        if self._graph:
            self._graph.launch()
            return
        self._queue()
        if not self.told:
            self.told = self._capture()

    def _queue(self) -> None:
        for link, session in self._links:
            for source, to in self._copies[link.name]:
                self._stream.copy(source, to)
            if link.name in self._loops:
                self._loops[link.name].queue()
            else:
                session.enqueue(self._stream)

    def _capture(self) -> str:
        self._stream.wait()
        try:
            self._graph = self._stream.capture(self._queue)
        except (EnvironmentProblem, StageError) as error:
            return f"at once, without a CUDA graph: {error.message}"
        return "in one CUDA graph"

    def _outcome(self) -> dict[str, Any]:
        for link, session in self._links:
            session.fetch(link.resident, self._stream)
        for loop in self._loops.values():
            self._stream.download(loop.state)
        self._stream.wait()
        outcome: dict[str, Any] = {}
        for link, session in self._links:
            outcome |= session.outcome(link.resident)
            if link.euler:
                outcome[link.euler.state] = self._loops[link.name].state.host.copy()
        return outcome

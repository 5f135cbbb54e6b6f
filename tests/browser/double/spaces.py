"""A stand-in for the package `spaces` on ZeroGPU, which needs machines of the Hub: a CPU plays the GPU.

As there, a generator under `GPU` runs in a forked process, to which its arguments and from which its answers
are pickled. A thread reads the answers. The process is killed when its time is over, and the request at hand
says who asks. `loans` has what was asked for; with SPACES_DOUBLE_LOG it is written to that file, too.
"""

import contextvars
import functools
import json
import multiprocessing
import os
import pickle
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import gradio as gr
from gradio.context import LocalContext

FORK = multiprocessing.get_context("fork")

loans: list[dict[str, Any]] = []
processes: list[Any] = []
# No process may inherit the end that another one writes to: the death of that one would go unseen.
forking = threading.Lock()


def work(task: Callable[..., Iterator[Any]], arguments: bytes, answers: Connection) -> None:
    try:
        for answer in task(*pickle.loads(arguments)):
            answers.send(("answer", answer))
        answers.send(("end", None))
    except Exception as error:
        traceback.print_exc()
        answers.send(("error", type(error).__name__))


def GPU(*, duration: int) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
    def decorate(task: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @functools.wraps(task)
        def run(*arguments: Any) -> Iterator[Any]:
            headers = getattr(LocalContext.request.get(None), "headers", {})
            loans.append({"duration": duration, "visitor": headers.get("x-ip-token")})
            if log := os.environ.get("SPACES_DOUBLE_LOG"):
                with open(log, "a") as file:
                    file.write(json.dumps(loans[-1]) + "\n")
            here: queue.Queue[tuple[str, Any]] = queue.Queue()
            with forking:
                answers, there = FORK.Pipe(duplex=False)
                process = FORK.Process(target=work, args=(task, pickle.dumps(arguments), there), daemon=True)
                process.start()
                there.close()
            processes.append(process)
            killer = threading.Timer(duration, process.kill)
            killer.start()

            def read() -> None:
                kind = "answer"
                while kind == "answer":
                    try:
                        kind, answer = answers.recv()
                    except (EOFError, OSError):  # killed, maybe in the middle of an answer
                        kind, answer = "lost", None
                    here.put((kind, answer))
                process.join()
                killer.cancel()
                answers.close()

            threading.Thread(target=contextvars.copy_context().run, args=(read,), daemon=True).start()
            while True:
                kind, answer = here.get()
                if kind == "end":
                    return
                if kind != "answer":
                    raise gr.Error("GPU task aborted" if kind == "lost" else answer)
                yield answer

        return run

    return decorate

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
from typing import Any

import gradio as gr
from gradio.context import LocalContext

FORK = multiprocessing.get_context("fork")

loans: list[dict[str, Any]] = []
processes: list[Any] = []


def work(task: Callable[..., Iterator[Any]], arguments: bytes, answers: Any) -> None:
    try:
        for answer in task(*pickle.loads(arguments)):
            answers.put(("answer", answer))
        answers.put(("end", None))
    except Exception as error:
        traceback.print_exc()
        answers.put(("error", type(error).__name__))


def GPU(*, duration: int) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
    def decorate(task: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @functools.wraps(task)
        def run(*arguments: Any) -> Iterator[Any]:
            headers = getattr(LocalContext.request.get(None), "headers", {})
            loans.append({"duration": duration, "visitor": headers.get("x-ip-token")})
            if log := os.environ.get("SPACES_DOUBLE_LOG"):
                with open(log, "a") as file:
                    file.write(json.dumps(loans[-1]) + "\n")
            answers, here = FORK.SimpleQueue(), queue.Queue()
            process = FORK.Process(target=work, args=(task, pickle.dumps(arguments), answers), daemon=True)
            process.start()
            processes.append(process)
            killer = threading.Timer(duration, process.kill)
            killer.start()

            def watch() -> None:
                process.join()
                killer.cancel()
                answers.put(("lost", None))

            def read() -> None:
                kind = "answer"
                while kind == "answer":
                    kind, answer = answers.get()
                    here.put((kind, answer))

            threading.Thread(target=watch, daemon=True).start()
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

#!/usr/bin/env -S python3 -IS
"""Starts a bench's many processes from one that has torch and its friends imported. For machines lent by the minute.

    python bench/preloaded.py serve SOCKET &         # imports once, then forks a child for each request
    PRELOADED=SOCKET bench/preloaded.py -P -m planner.cli --run baseline ...

What is run, is run as by `python`, in a process of its own with its own arguments, environment, folder and streams; it
saves the ten to fifteen seconds in which a bare machine imports the libraries. `sys.executable` of a child is this
file, so that what it starts (the planner's worker, the trainer) comes from here too. CUDA must not be touched before
the fork: PYTORCH_NVML_BASED_CUDA_CHECK keeps torch from it. "Start" in a record made so is the fork, not the imports.
"""

import json
import os
import signal
import socket
import sys

LIBRARIES = (
    "numpy",
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.trainer",
    "transformers.integrations.sdpa_attention",
    "accelerate",
    "peft",
    "datasets",
    "rich.console",
    "rich.progress",
    "click",
    "tabulate",
)
OPTIONAL = ("trl", "trl.trainer.sft_trainer")


def ask() -> int:
    """Have this command line run by the server; its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["PRELOADED"])
        request = {"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
        content = json.dumps(request).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(content)
        child = int.from_bytes(_exactly(connection, 8), "big")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda got, _frame: os.kill(child, got))
        return int.from_bytes(_exactly(connection, 8), "big")


def _exactly(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise SystemExit("preloaded: the server has gone")
        content += part
    return content


def serve(path: str) -> None:
    """Import, then fork a child for each request, for ever."""
    import importlib

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError as reason:
            print(f"preloaded: {name} is not here ({reason})", file=sys.stderr)
    sys.executable = os.path.abspath(__file__)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the keepers need nobody to wait for them
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(16)
        print("preloaded: ready", file=sys.stderr, flush=True)
        own = os.getpid()
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _keep(connection, own)
            connection.close()


def _keep(connection: socket.socket, server: int) -> None:
    """Fork the child proper, wait for it, pass on how it ended."""
    first, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size = int.from_bytes(first + _exactly(connection, 8 - len(first)), "big")
    request = json.loads(_exactly(connection, size))
    child = os.fork()
    if child == 0:
        connection.close()
        _become(request, streams, server)
    for stream in streams:
        os.close(stream)
    connection.sendall(child.to_bytes(8, "big"))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    try:
        connection.sendall((code if code >= 0 else 128 - code).to_bytes(8, "big"))
    except OSError:
        os._exit(1)  # whoever asked was killed
    os._exit(0)


def _become(request: dict, streams: list, server: int) -> None:  # type: ignore[type-arg]
    """In the child: run what was asked for, as `python` would, and leave."""
    import atexit
    import runpy
    import threading
    import traceback

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for entry in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if entry and entry not in sys.path:
            sys.path.insert(0, entry)
    arguments = list(request["arguments"])
    is_safe = False
    while arguments and arguments[0] in ("-P", "-I", "-S", "-u"):
        is_safe = arguments.pop(0) == "-P" or is_safe
    code = 0
    try:
        if arguments[:2] == ["-m", "planner.cli"]:
            _adopt(server)
        if arguments[0] == "-m":
            sys.argv = [arguments[1], *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<command>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _adopt(server: int) -> None:
    """Have the planner count what the server forks as its own: its workers are no children of its process here."""
    import psutil

    from planner import meter
    from trainer import company

    def family(of: psutil.Process) -> list[psutil.Process]:
        try:
            return list({of, psutil.Process(server), *psutil.Process(server).children(recursive=True)})
        except psutil.Error:  # one of them has just left
            return [of]

    company.family = meter.family = family  # type: ignore[assignment]


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    else:
        raise SystemExit(ask())

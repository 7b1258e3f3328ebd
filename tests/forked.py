"""A warmed process that forks a child for every command line of symbreak: importing takes seconds, a fork nothing.

It reads tasks from stdin, a JSON object a line: ``argv`` and what is to go wrong in the child. It answers {"pid"} at
once and {"code", "said", "seconds"} at the end: the code, negative for a signal, and all of stdout and stderr.
It runs on one thread and starts none, so that a fork is safe.
"""

import errno
import json
import os
import resource
import signal
import sys
import time


def fall_at(count, folder):
    """Kill this process right before its count-th change of a file below ``folder``."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if not (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")):
            return
        if str(arguments[0]).startswith(folder):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def full_at(count):
    """The disk is full from the count-th file on: what is written does not reach it."""
    real, seen = os.fsync, 0

    def fsync(descriptor):
        nonlocal seen
        seen += 1
        if seen >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    os.fsync = fsync


def run(task, ear, mouth):
    """In the child; never returns."""
    os.close(ear)
    for stream in (1, 2):
        os.dup2(mouth, stream)
    os.close(mouth)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(task.get("environment", {}))
    if "checkpoint_seconds" in task:
        from symbreak.start.train import train_network

        train_network.__wrapped__.__kwdefaults__["checkpoint_seconds"] = task["checkpoint_seconds"]
    if "fall_at" in task:
        fall_at(*task["fall_at"])
    if "full_at" in task:
        full_at(task["full_at"])
    if "largest_file" in task:  # Python ignores SIGXFSZ, so that writing beyond gives EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest_file"], resource.RLIM_INFINITY))
    from symbreak.cli.commands import main

    code = 70
    try:
        main(task["argv"])
    except SystemExit as left:
        code = left.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(**values):
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def serve():
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    import symbreak
    from symbreak.cli.commands import main  # noqa: F401
    from symbreak.metrics import extractor
    from symbreak.start import choose
    from symbreak.start.loading import load_pipeline

    torch.set_num_threads(1)
    for name in symbreak.__all__:
        getattr(symbreak, name)
    load_pipeline("digits")
    extractor("digits-classifier")
    choose.LEVELS, choose.LOSSES, choose.STATES = 4, 8, 32  # what is killed and goes on need not choose well
    answer(ready=os.getpid())
    for line in sys.stdin:
        task = json.loads(line)
        began = time.monotonic()
        ear, mouth = os.pipe()
        pid = os.fork()
        if pid == 0:
            run(task, ear, mouth)
        os.close(mouth)
        answer(pid=pid)
        with open(ear, errors="replace") as stream:
            said = stream.read()
        _, status = os.waitpid(pid, 0)
        answer(code=os.waitstatus_to_exitcode(status), said=said, seconds=time.monotonic() - began)


if __name__ == "__main__":
    serve()

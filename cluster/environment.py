"""Environment variables: for a while, and those that libraries read when they are imported."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

WAIT_POLICY = "OMP_WAIT_POLICY"


def wait_passively() -> None:
    """Let threads of PyTorch that wait for one another sleep, not spin. To be called before PyTorch is imported.

    A network of small kernels has thousands of such waits. Where other processes want the cores too, threads that spin
    take them from the very thread that is waited for; docs/performance.md says what was measured. A policy that the
    environment names already is left alone.
    """
    os.environ.setdefault(WAIT_POLICY, "PASSIVE")


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Inside the block, this process has these environment variables; after it, those it had."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

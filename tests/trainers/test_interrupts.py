"""Ctrl-C while a training runs: noticed wherever it comes, and raised only when it comes again."""

import signal

import pytest

from trainers.launch import _interrupts_counted


class SwallowsErrors:
    """Python prints what is raised while an object is given up, and goes on; Ray's references are such objects."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_is_noticed_even_where_what_it_raises_is_swallowed() -> None:
    with _interrupts_counted() as interrupts:
        assert not interrupts
        SwallowsErrors()
        assert interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_interrupt_is_raised(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)
    try:
        with _interrupts_counted():
            signal.raise_signal(number)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_handler_of_others_is_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with _interrupts_counted():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)

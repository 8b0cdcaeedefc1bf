"""The states of the circuit breaker, on a clock of the test's own."""

import pytest

from megatron_agent.rewards.breaker import CircuitBreaker


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return CircuitBreaker(max_failures=3, pause_s=10.0, clock=clock)


def calls(breaker, *outcomes):
    """What each outcome reports."""
    found = []
    for outcome in outcomes:
        breaker.begin()
        found.append(getattr(breaker, outcome)())
    return found


def test_failures_in_a_row_open_it(breaker, clock):
    assert calls(breaker, "fail", "fail", "succeed", "fail", "fail") == [False, False, False, False, False]
    assert breaker.state == "closed" and breaker.lets_pass
    assert calls(breaker, "fail") == [True]
    assert breaker.state == "open" and not breaker.lets_pass
    clock.now_s = 9.9
    assert not breaker.lets_pass


def test_one_probe_after_the_pause(breaker, clock):
    calls(breaker, "fail", "fail", "fail")
    clock.now_s = 10.0
    assert breaker.state == "half-open" and breaker.lets_pass
    breaker.begin()
    assert not breaker.lets_pass  # the probe is under way
    assert breaker.succeed() is True
    assert breaker.state == "closed" and breaker.lets_pass
    assert calls(breaker, "fail", "fail") == [False, False]  # counts anew
    assert breaker.state == "closed"


def test_a_failed_probe_pauses_again(breaker, clock):
    calls(breaker, "fail", "fail", "fail")
    clock.now_s = 12.0
    assert calls(breaker, "fail") == [False]  # it was open before: nothing new to report
    clock.now_s = 21.9
    assert breaker.state == "open"
    clock.now_s = 22.0
    assert breaker.lets_pass


def test_an_abandoned_probe_gives_its_place_back(breaker, clock):
    calls(breaker, "fail", "fail", "fail")
    clock.now_s = 10.0
    calls(breaker, "abandon")
    assert breaker.state == "half-open" and breaker.lets_pass


def test_calls_of_before_that_end_while_it_is_open(breaker, clock):
    for _ in range(5):
        breaker.begin()
    assert [breaker.fail() for _ in range(3)] == [False, False, True]
    clock.now_s = 5.0
    assert breaker.fail() is False  # late: does not prolong the pause
    clock.now_s = 10.0
    assert breaker.state == "half-open"
    assert breaker.succeed() is True  # late too, and proof of life
    assert breaker.state == "closed"

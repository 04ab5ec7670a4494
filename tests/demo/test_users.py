"""What simulated users promise: documented arithmetic, ratings in [0, 1], personas that disagree."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.users import PERSONAS, REFUSED, Experience, Persona

experiences = st.lists(
    st.builds(Experience, latency_ms=st.floats(0, 1e7) | st.just(math.inf), is_correct=st.booleans()),
    min_size=1,
    max_size=50,
)


def served(latency_ms: float, wrong: int = 0, count: int = 20) -> list[Experience]:
    return [Experience(latency_ms, is_correct=index >= wrong) for index in range(count)]


@given(st.sampled_from(list(PERSONAS.values())), experiences)
def test_a_rating_is_a_share_whatever_happened(persona: Persona, lived: list[Experience]) -> None:
    assert 0 <= persona.rate(lived) <= 1


@pytest.mark.parametrize("persona", PERSONAS.values(), ids=PERSONAS.keys())
def test_faster_and_more_right_is_never_rated_lower(persona: Persona) -> None:
    ratings = [persona.rate(served(latency_ms)) for latency_ms in (1, 10, 50, 200, 1000)]
    assert ratings == sorted(ratings, reverse=True)
    assert persona.rate(served(20, wrong=0)) > persona.rate(served(20, wrong=1)) > persona.rate(served(20, wrong=3))


def test_the_rating_follows_the_documented_formula() -> None:
    persona = Persona("example", patience_ms=100, steepness=2, strictness=2)
    assert persona.rate(served(100, wrong=5)) == pytest.approx(0.5 * (1 - 2 * 0.25))


def test_a_refused_request_is_slow_and_wrong() -> None:
    persona = PERSONAS["careful"]
    assert persona.rate([REFUSED]) == 0
    assert persona.rate([*served(10), REFUSED]) < persona.rate(served(10))


def test_personas_disagree_about_fast_and_rough_against_slow_and_right() -> None:
    fast_and_rough, slow_and_right = served(4, wrong=3), served(50, wrong=1)
    impatient, careful = PERSONAS["impatient"], PERSONAS["careful"]
    assert impatient.rate(fast_and_rough) > impatient.rate(slow_and_right) + 0.1
    assert careful.rate(slow_and_right) > careful.rate(fast_and_rough) + 0.1

"""The texts that the engine ships and trains on."""

from __future__ import annotations

import pytest

from eplb_fsm.engines.reference import gather
from eplb_fsm.engines.reference.corpus import DOMAINS, check_domain, evaluation_text, training_text
from eplb_fsm.engines.reference.generators import GENERATORS
from eplb_fsm.errors import ConfigError


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_an_evaluation_text(domain: str) -> None:
    """Each domain ships 20 to 60 KB of UTF-8 (a generated text may be cut inside a character: it is ASCII)."""
    text = evaluation_text(domain)
    assert 20_000 <= len(text) <= 60_000
    assert text.decode("utf-8")


@pytest.mark.parametrize("domain", GENERATORS)
def test_generated_texts_are_what_the_generator_makes(domain: str) -> None:
    """The shipped logs and JSON come from the shipped generator, to the byte."""
    assert GENERATORS[domain](gather.EVALUATION_SEED, gather.EVALUATION_BYTES) == evaluation_text(domain)


@pytest.mark.parametrize("domain", DOMAINS)
def test_training_never_reads_the_evaluation_text(domain: str) -> None:
    """No 200 bytes of an evaluation text are in the training text of its domain."""
    text, training = evaluation_text(domain), training_text(domain, seed=1)
    assert not any(text[at : at + 200] in training for at in range(0, len(text) - 200, 1000))


def test_an_unknown_domain_is_refused() -> None:
    """The error names the domains that exist."""
    with pytest.raises(ConfigError, match="choose one of code, english"):
        check_domain("klingon")

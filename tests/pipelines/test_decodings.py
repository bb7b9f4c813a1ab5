"""Decodings by name: what the command line and the app offer."""

import pytest

from studio import DECODINGS, StudioError, decoding_named


@pytest.mark.parametrize("name", DECODINGS)
def test_every_decoding_can_be_made_and_says_what_it_is(name):
    choice = decoding_named(name)
    assert choice.settings() == choice.settings(**{option.name: option.default for option in choice.options})
    assert choice.title and all(text.endswith(".") for text in (choice.summary, *(o.summary for o in choice.options)))


def test_options_arrive():
    assert decoding_named("lantern").settings(delta=0.3, neighbours=7).k == 7


def test_unknown_names_and_options_are_refused():
    with pytest.raises(StudioError, match="speculative"):
        decoding_named("fast")
    with pytest.raises(StudioError, match=r"no options, not delta; delta belongs to lantern\."):
        decoding_named("speculative").settings(delta=0.1)
    with pytest.raises(StudioError, match="delta, neighbours"):
        decoding_named("lantern").settings(colour=1)

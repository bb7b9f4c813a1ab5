class StudioError(ValueError):
    """A mistake the user can mend: the message is one sentence that says what to do."""

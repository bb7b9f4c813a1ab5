"""One training recipe per bundled model."""

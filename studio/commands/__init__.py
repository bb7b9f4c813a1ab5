"""The commands of `studio`, a file for each kind; `studio.cli` puts them together."""

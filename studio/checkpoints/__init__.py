"""Bundled models, loading by name, folder or Hub id, and converters of published checkpoints."""

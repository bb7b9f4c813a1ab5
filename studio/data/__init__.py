"""The Fluent Emoji set: images, captions, and the splits into training and held-out data."""

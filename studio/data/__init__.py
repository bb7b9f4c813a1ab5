"""The Fluent Emoji set: images, captions, and the splits that keep training and measuring apart."""

"""The Fluent Emoji set: pictures, captions, and the splits that keep training and measuring apart."""

"""Mixed-modal decoding."""

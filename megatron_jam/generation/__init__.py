"""Mixed-modal decoding with classifier-free guidance."""

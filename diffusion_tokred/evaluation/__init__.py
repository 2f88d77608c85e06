"""Floor 5: what a reduction costs and gains, measured. Uses the public API only; nothing heavy is imported here."""

"""iTPN."""

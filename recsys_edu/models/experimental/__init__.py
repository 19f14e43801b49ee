"""Models outside the core: tried, tested, and free to change."""

"""What keeps a run fast and alive. A package, so that no other `support` on the path comes before it."""

"""What is here for other interpreters."""

collect_ignore = ["sglang"]

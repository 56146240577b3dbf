"""Copies hot blocks between regions, and warms nodes before they take traffic."""

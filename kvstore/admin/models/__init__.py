"""What goes over the wire. Keys and digests are lower-case hexadecimal; sizes are bytes; times are seconds since the epoch."""

"""The engine: one request at a time, from pictures and messages to a stream of text, on a bundle's graphs."""

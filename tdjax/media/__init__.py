"""Images and videos as arrays and files."""

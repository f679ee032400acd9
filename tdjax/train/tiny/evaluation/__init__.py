"""What a generated clip shows, and the table of variants."""

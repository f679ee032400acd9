"""From videos and their captions to the shards that training reads."""

"""What lasts: the model repository on disk, and the database of keys."""

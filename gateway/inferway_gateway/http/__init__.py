"""Routes, codecs and middleware: HTTP on one side, the core on the other."""

"""The study: every method x source x target x seed from one file, as commands that a user could type."""

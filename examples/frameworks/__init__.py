"""A small service in several frameworks, in plain ASGI and as a command line.  Run each from the parent folder."""
